"""How an optimiser's state is portioned; free of torch, so that a memory plan may read it."""

PAGE_BYTES = 4 << 20
"""Long enough that a page's copy runs at full speed, short enough that budgets of some MiB hold several."""

SMALLEST_8BIT_NUMEL = 4096
"""Below this, 8-bit moments save next to nothing and a few outliers share one absmax: norms and biases stay 32-bit."""
