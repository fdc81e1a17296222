"""The next-token loss without logits of the whole sequence."""
