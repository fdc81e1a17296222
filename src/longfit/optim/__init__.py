"""Floor 2: AdamW whose state may be 8-bit and may live on the accelerator, in host memory or in a file."""
