"""How much the engine holds at once where nobody forces it; free of torch, so that a memory plan may read it.

None of these grows with the context: they are what a tile may take, in exchange for speed.
"""

CPU_WORKSPACE_BYTES = 256 << 20
"""What a tile's activations may take on a CPU: SmolLM2-135M steps in tiles of 4,096 tokens, 6 % faster than in 2,048
and 20 % faster than in 512, as its weights are de-quantised once a tile."""

DEVICE_WORKSPACE_BYTES = 1 << 30
"""And on an accelerator: 2,048 tokens of Llama-3.1-8B."""

SMALLEST_TILE, LARGEST_TILE = 256, 4096

CPU_LOGITS = 1 << 24
"""Logits held at once on a CPU: 64 MiB in float32, and as much again in temporaries, whatever context and vocabulary.
For a vocabulary of 49,152 a sixth faster than twice as many, which leave the cache between one operation and the next.
"""

DEVICE_LOGITS = 1 << 25
"""And on an accelerator, where fewer tokens would not pay for reading the output matrix."""

GRADIENT_ROWS = 4096
"""Rows of the output matrix whose gradient is added at once: torch adds a bf16 product to a float32 sum through a
float32 copy of the product, 107 MB for all rows of SmolLM2."""

CPU_SAVED_ATTENTION_BYTES = 512 << 20
"""Attention outputs saved for backward on a CPU: those of SmolLM2-135M at 14,000 tokens. On an accelerator, none."""

TRIMMED_LAYERS = 4
"""Layers differentiated on a CPU between two trims of the heap (``host_memory.py``)."""


def tile_tokens(hidden_size: int, intermediate_size: int, element_bytes: int, device_type: str) -> int:
    """Tokens per tile: as many as keep a tile's activations in the workspace of the device, a power of two.

    A layer's local graph holds about 18 vectors of the hidden size and 9 of the intermediate size per token
    (projections, their adapters, norms in float32, the gated product and their gradients): 394 kB were counted for
    Llama-3.1-8B with rank 32 (``tests/engine/sweep/test_memory.py``), and this says 405.

    Args:
        hidden_size, intermediate_size: of the text model; the widest layer's.
        element_bytes: of the activations.
        device_type: "cpu", "cuda", ...
    """
    bytes_per_token = element_bytes * (18 * hidden_size + 9 * intermediate_size)
    budget = CPU_WORKSPACE_BYTES if device_type == "cpu" else DEVICE_WORKSPACE_BYTES
    fitting = max(1, budget // bytes_per_token)
    return max(SMALLEST_TILE, min(LARGEST_TILE, 1 << (fitting.bit_length() - 1)))
