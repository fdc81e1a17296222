"""Memory for de-quantised weights: one per stream, used again by every matmul, and by every tile of a swept layer.

On a card a large matmul is fastest as de-quantise, then a dense GEMM. The dense copy needs memory for as long as the
GEMM runs, and no longer: work on one stream is in order, so the next matmul may write over it. That is one buffer per
stream, whatever the number of layers.

A layer that is swept over a sequence multiplies by the same weights once per tile. Inside ``weights_held`` each weight
is de-quantised at its first use and kept until the end, at the price of a layer's weights in 16 bits (0.44 GB for an 8B
model). The buffers outlive the block: the next layer, whose weights have the same sizes, writes over them.

Why a block and not a cache by address: frozen weights may be streamed through two slots of device memory, so that one
address holds another layer's bytes a moment later. Whoever opens the block promises that no weight changes inside it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from longfit.compat.torch import version_of
from longfit.kernels.dense_weight_bytes import HELD_BYTES


class Workspace:
    """The buffers of one stream."""

    def __init__(self, held_bytes: int = HELD_BYTES) -> None:
        self._held_bytes = held_bytes
        self._buffers: list[Tensor] = []  # uint8; the first also serves what is not held
        self._held: dict[tuple[object, ...], tuple[Tensor, int, Tensor]] | None = None

    @contextmanager
    def weights_held(self) -> Iterator[None]:
        """Keep each weight from its first use on; inside another such block this one does nothing."""
        if self._held is not None:
            yield
            return
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def dense(
        self, source: Tensor, shape: tuple[int, ...], dtype: torch.dtype, dequantize: Callable[[Tensor], None]
    ) -> Tensor:
        """Return a weight, de-quantised now or held from an earlier use; valid until the next call unless it is held.

        Args:
            source: the packed weight, which tells one weight from another.
            shape, dtype: of the dense weight.
            dequantize: fills a tensor like this.
        """
        num_bytes = dtype.itemsize * shape[0] * shape[1]
        if source.is_cuda and torch.cuda.is_current_stream_capturing():
            out = torch.empty(
                shape, dtype=dtype, device=source.device
            )  # belongs to the graph, which outlives the block
            dequantize(out)
            return out
        if self._held is None:
            return self._filled(0, num_bytes, shape, dtype, source.device, dequantize)
        key = (source.data_ptr(), source.shape, source.stride(), dtype)
        if key in self._held:
            known, version, out = self._held[key]
            assert version_of(known) == version, "a packed weight was written to while its dense copy was held"
            return out
        used = sum(out.nbytes for _, _, out in self._held.values())
        if used + num_bytes > self._held_bytes:
            return self._filled(len(self._held), num_bytes, shape, dtype, source.device, dequantize)
        out = self._filled(len(self._held), num_bytes, shape, dtype, source.device, dequantize)
        self._held[key] = source, version_of(source), out  # the source is kept, so that its address stays its own
        return out

    def _filled(
        self,
        number: int,
        num_bytes: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        dequantize: Callable[[Tensor], None],
    ) -> Tensor:
        """Return buffer ``number``, made larger if need be, filled with the weight."""
        if number == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8, device=device))
        if self._buffers[number].numel() < num_bytes:
            self._buffers[number] = torch.empty(0, dtype=torch.uint8, device=device)  # freed before the new one is made
            self._buffers[number] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        out = self._buffers[number][:num_bytes].view(dtype).view(shape)
        dequantize(out)
        return out


def workspace(device: torch.device) -> Workspace:
    """Return the workspace of a device's current stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _workspace(device, stream)


@cache
def _workspace(device: torch.device, stream: int) -> Workspace:
    return Workspace()


@contextmanager
def weights_held(device: torch.device) -> Iterator[None]:
    """De-quantise each 4-bit weight once while this lasts, on the device's current stream.

    Only for a block in which no 4-bit weight changes or moves, such as the sweep of one layer in one direction. On a
    CPU it has no effect: its kernels de-quantise a tile of a weight at a time, in the cache.
    """
    if device.type != "cuda":
        yield
        return
    with workspace(device).weights_held():
        yield
