"""How much a kernel holds at once; free of torch, so that a memory plan may read it."""

HELD_BYTES = 2 << 30
"""Dense weights held at once on an accelerator: a layer of Llama-3-70B in 16 bits is 1.7 GB. What exceeds it is
de-quantised at every use, as if nothing were held."""

TILE_BYTES = 4 << 20
"""The part of W that is de-quantised at once for torch's GEMM on a CPU. From 1 to 4 MiB the speed is the same at 256
rows of x; at 1,024 rows 4 MiB costs 4 % over the dense matmul, 1 MiB 14 % (4096 x 4096, bf16). A matmul may use 8 MiB
in all."""
