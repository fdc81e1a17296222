"""Best fit, longest first: each run of tokens goes into the fullest window that still has room for it.

Runs of one length are laid out together: as many as fit go into the fullest window, and so on, which is where one after
the other would put them. So a million documents take as many steps as they have lengths. (Johnson 1974: at most 11/9 of
the fewest windows, and a constant.)
"""

from array import array
from bisect import bisect_left, insort
from hashlib import blake2b
from itertools import pairwise

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, context: int, *, ties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay runs into windows.

    Args:
        lengths: int64 ``[R]``, each from 1 to `context`.
        ties: uint64 ``[R, 2]``, the order of equally long runs.
    Returns: int64 ``[R]``, the runs in the order of their windows; int64 ``[W + 1]``, where each window begins in it.
    """
    order = np.lexsort((ties[:, 1], ties[:, 0], -lengths))
    descending = lengths[order]
    window_of = np.empty(len(order), dtype=np.int64)
    windows = _Windows(context)
    edges = np.flatnonzero(np.diff(descending, prepend=0, append=0)).tolist()
    for begin, end in pairwise(edges):
        length = int(descending[begin])
        while begin < end:
            taken = windows.take(length, end - begin)
            window_of[begin : begin + len(taken)] = taken
            begin += len(taken)
    by_window = np.argsort(window_of, kind="stable")  # within a window, the longest first
    bounds = np.concatenate([[0], np.cumsum(np.bincount(window_of, minlength=windows.count), dtype=np.int64)])
    return order[by_window], bounds


class _Windows:
    """Windows by the space that is left in them."""

    def __init__(self, context: int) -> None:
        self.context, self.count = context, 0
        self._spaces: list[int] = []  # those that occur, ascending, each once
        self._with: dict[int, array[int]] = {}  # space -> windows that have it, the last one first to be filled

    def take(self, length: int, most: int) -> np.ndarray:
        """Put runs of one length into windows that have the same space, the smallest there is; one for each run."""
        nearest = bisect_left(self._spaces, length)
        is_new = nearest == len(self._spaces)
        space = self.context if is_new else self._spaces[nearest]
        each = space // length
        needed = -(-most // each)
        if is_new:
            windows = np.arange(self.count, self.count + needed)
            self.count += needed
        else:
            stack = self._with[space]
            windows = np.asarray(stack[: -needed - 1 : -1], dtype=np.int64)
            del stack[-needed:]
            if not stack:
                del self._with[space], self._spaces[nearest]
        taken = np.repeat(windows, each)[:most]
        in_last = len(taken) - each * (len(windows) - 1)
        self._leave(windows[:-1], space - each * length)
        self._leave(windows[-1:], space - in_last * length)
        return taken

    def _leave(self, windows: np.ndarray, space: int) -> None:
        if space and len(windows):
            if space not in self._with:
                insort(self._spaces, space)
                self._with[space] = array("q")
            self._with[space].extend(windows.tolist())


def ranks(seed: int, numbers: np.ndarray) -> np.ndarray:
    """Sort keys that look random and are the same everywhere, unlike the generators of numpy and torch.

    Args: numbers: int64 ``[R, K]``, at least 0: what a key is made of.
    Returns: uint64 ``[R, 2]``, a digest each, its first half and its second.
    """
    rows = np.ascontiguousarray(numbers, dtype="<i8").tobytes()
    step = 8 * numbers.shape[1]
    key = seed.to_bytes(16, "little", signed=True)
    digests = bytearray()
    for begin in range(0, len(rows), step):
        digests += blake2b(rows[begin : begin + step], digest_size=16, key=key).digest()
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 2).astype(np.uint64)
