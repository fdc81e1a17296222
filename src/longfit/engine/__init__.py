"""Floor 3: attention, layers and the loss swept over the sequence tile by tile."""
