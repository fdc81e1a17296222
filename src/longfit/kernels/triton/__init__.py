"""The Triton kernels for CUDA; imported nowhere but on a machine with a card, or by their tests."""
