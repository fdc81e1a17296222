"""Where layer inputs, and frozen weights, wait until backward needs them."""
