"""The memory that pages are held in on one device, and the copies into it and out of it.

Between an accelerator and pinned host memory the copies run on a stream of their own; between host memory and a file
they are reads and writes. Frames are used again: the one a page leaves is the one the next page enters, still warm in
the cache that the copy goes through.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from longfit.errors import PagingError


class Tier(Protocol):
    """The next slower place for pages."""

    def read(self, page: int, frame: Tensor) -> bool:
        """Copy the page into ``frame``; return False, and leave it alone, if the page was never written."""

    def write(self, page: int, frame: Tensor) -> None:
        """Take the page's contents over from ``frame``."""


class Frames:
    """Frames of one device over a tier.

    Args:
        device: where the frames are.
        page_bytes: bytes of a frame.
        below: the tier the pages are copied to; None: they never leave.
        pinned: whether host frames are page-locked, so that copies to an accelerator run beside its kernels.
    """

    in_file = False

    def __init__(
        self, device: torch.device, *, page_bytes: int, below: Tier | None = None, pinned: bool = False
    ) -> None:
        self.page_bytes = page_bytes
        self.can_leave = below is not None
        self._device = device
        self._below = below
        self._pinned = pinned
        self._spare: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._used: dict[int, torch.cuda.Event] = {}  # page -> when the work given to its frame is done

    def enter(self, page: int) -> tuple[Tensor, bool]:
        """Return a frame with the page's contents, and whether they were copied: a new page starts with zeros."""
        with self._on_stream():
            reused = bool(self._spare)
            frame = self._spare.pop() if reused else self._new_frame()
            copied = self._below is not None and self._below.read(page, frame)
            if reused and not copied:
                frame.zero_()
            if self._stream is not None:
                self._stream.synchronize()
        return frame, copied

    def store(self, page: int, frame: Tensor) -> None:
        """Copy the page to the tier below, after the work that was given to its frame."""
        if self._below is not None:
            with self._on_stream():
                self._await_use(page)
                self._below.write(page, frame)

    def leave(self, page: int, frame: Tensor) -> None:
        """Keep the frame for the next page; what is copied into it waits for the work that was given to it."""
        self._await_use(page)
        self._used.pop(page, None)
        self._spare.append(frame)

    def note_use(self, page: int) -> None:
        """Note that work on the page's frame has been given to the device's current stream."""
        if self._stream is not None:
            self._used[page] = torch.cuda.current_stream(self._device).record_event()

    def release(self) -> None:
        """Free the spare frames, once no kernel uses them."""
        if self._stream is not None:
            self._stream.synchronize()  # it waits for the use of every frame that left
        self._spare.clear()

    def _new_frame(self) -> Tensor:
        try:
            return torch.zeros(self.page_bytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):  # of an accelerator: a cache can live with less
                raise
            raise PagingError(
                f"no memory for a page of {self.page_bytes:,} bytes: lower optim.budget, or raise the limit of this "
                "process (ulimit -v)"
            ) from error

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def _await_use(self, page: int) -> None:
        if self._stream is not None and page in self._used:
            self._stream.wait_event(self._used[page])


def copy_frame(source: Tensor, target: Tensor) -> None:
    """Copy a frame. To or from an accelerator it runs on the current stream, that of the tier above, and is waited for.

    The one that waits is the paging thread: kernels on the page in use go on beside the copy.
    """
    target.copy_(source, non_blocking=source.is_cuda or target.is_cuda)
    for frame in (source, target):
        if frame.is_cuda:
            torch.cuda.current_stream(frame.device).synchronize()
