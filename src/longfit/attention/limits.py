"""Sizes that bound what one call of a fast attention kernel is given; free of torch, as the memory plan reads them."""

KEY_BLOCK = 8192
"""Keys whose gradients exist in 16 bits at once on an accelerator: for 32 heads of 128 dimensions 134 MB; and enough
work for any card. Not tuned on one yet."""
