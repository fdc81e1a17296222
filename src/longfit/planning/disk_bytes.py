"""What a run writes to disk, in bytes: the plan, the check before the first step and the saver all count with these.

What this is not: the files of paged state, streamed weights and offloaded layer inputs, which `memory.py` counts.
"""

OVERHEAD_BYTES = 16 << 20
"""Of a saved folder: tokenizer, configuration, metrics, and what the file system adds."""


def adapter_bytes(trained: int) -> int:
    """Bytes of an adapter folder; ``trained`` are the bytes of what is trained."""
    return trained + OVERHEAD_BYTES


def checkpoint_bytes(*, trained: int, state: int) -> int:
    """Bytes of a checkpoint (``training/checkpoint.py``): its adapter, the trained tensors, the optimiser's state."""
    return adapter_bytes(trained) + trained + state


def run_bytes(*, trained: int, state: int, keep: int, best: bool = False) -> int:
    """Most bytes of a run at any moment: the checkpoints kept, one being written beside them, and the result.

    Args:
        best: whether the adapter of the best evaluation is kept; it is replaced while no checkpoint is written.
    """
    adapters = 2 if best else 1
    return (keep + 1) * checkpoint_bytes(trained=trained, state=state) + adapters * adapter_bytes(trained)
