"""Floor 4: documents read, packed into windows, and accounted for token by token."""
