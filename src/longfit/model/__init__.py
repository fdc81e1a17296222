"""Floor 4: a pretrained model loaded, quantised, extended, adapted and saved."""
