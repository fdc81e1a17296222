"""Sizes of attention that the memory plan reads too: free of torch."""

KEY_BLOCK = 8192
"""Keys whose gradients exist in 16 bits at once on an accelerator: for 32 heads of 128 dimensions 134 MB; and enough
work for any card. Not tuned on one yet."""


def quarter_of(context: int) -> int:
    """Tokens per group of shifted attention where nobody says: a quarter of the context, even (LongLoRA, section
    3.2)."""
    return max(2, context // 4 // 2 * 2)
