"""Consecutive elements of a tensor in row-major order, whatever its strides, without copying the whole tensor.

State is kept in row-major order. A transposed or sliced parameter has no flat view of that order; only the rows that
hold the wanted elements are copied then.
"""

from torch import Tensor


def take(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return elements ``start`` to ``stop`` as ``[stop - start]``: a view where the strides allow it, else a copy."""
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return flat if stop - start == flat.numel() else flat[start:stop]
    rows, skipped = _rows_around(tensor, start, stop)
    return rows.reshape(-1)[skipped : skipped + stop - start].contiguous()


def put(tensor: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Write ``values`` ``[stop - start]`` to elements ``start`` to ``stop``."""
    if tensor.is_contiguous():
        tensor.view(-1)[start:stop].copy_(values)
        return
    rows, skipped = _rows_around(tensor, start, stop)
    flat = rows.flatten().clone()
    flat[skipped : skipped + stop - start].copy_(values)
    rows.copy_(flat.view(rows.shape))


def _rows_around(tensor: Tensor, start: int, stop: int) -> tuple[Tensor, int]:
    """Return the rows that hold the elements, and how many elements of them come before ``start``."""
    width = tensor[0].numel()
    first = start // width
    return tensor[first : -(-stop // width)], start - first * width
