"""Floor 6: the training loop and the files of a run."""
