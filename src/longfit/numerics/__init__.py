"""Floor 0: the papers as pure functions of tensors, and the oracle for everything faster above."""
