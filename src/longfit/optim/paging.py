"""Pages of optimiser state moving between tiers: accelerator, pinned host memory, file (QLoRA, section 3).

The paper calls it "Paged Optimizers". A tier is a ``PageCache``: at most so many pages in one device's memory, the
least recently used making room, and a tier below that takes what does not fit. Tiers stack, and the file is the last:

    PageCache(cuda, budget)  over  PageCache(pinned host, host budget)  over  PageFile
    PageCache(cpu, budget)   over  PageFile

An optimiser's pass over its pages is a ``sweep``: while one page is updated, a worker thread writes the page that must
leave and reads the one that comes next. Every second sweep runs backwards. Least-recently-used is the worst policy for
a loop that always runs forwards (it evicts each page just before its turn); backwards, the pages that were used last
are the ones needed first, and the share of the state that fits the budget is not moved at all.

What it is not: managed memory. bitsandbytes pages with ``cudaMallocManaged``: whole tensors, those above 100,000
elements only, moved by the driver's faults, with a device synchronisation after every parameter. Here copies are
explicit, on their own stream, of one size, and for every parameter.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from longfit.errors import ConfigError

# While one frame is updated the other is filled.
SMALLEST_CAPACITY = 2


class Tier(Protocol):
    """What a cache needs of the tier below it."""

    def read(self, page: int, frame: Tensor) -> bool:
        """Copy the page into ``frame``; return False, and leave it alone, if the page was never written."""

    def write(self, page: int, frame: Tensor) -> None:
        """Take the page's contents over from ``frame``."""


class PageCache:
    """The pages that are in one device's memory, and the way to those that are not.

    Args:
        device: where the frames are.
        page_bytes: bytes of a frame.
        capacity: frames at most; None: as many as there are pages.
        below: the tier that holds the other pages; without one nothing ever leaves.
        pinned: whether host frames are page-locked, so that copies to an accelerator run beside its kernels.
    Raises:
        ConfigError: the capacity is below two frames, or limited with no tier below.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        page_bytes: int,
        capacity: int | None = None,
        below: Tier | None = None,
        pinned: bool = False,
    ) -> None:
        if capacity is not None and capacity < SMALLEST_CAPACITY:
            raise ConfigError(
                f"the budget holds {capacity} page(s) of {page_bytes} bytes; allowed: at least {SMALLEST_CAPACITY}, "
                f"one in use and one on its way; give {SMALLEST_CAPACITY * page_bytes} bytes or a smaller page_bytes"
            )
        if capacity is not None and below is None:
            raise ConfigError(f"a budget on {device}: the other pages need somewhere to be; give path= for a page file")
        self.device = device
        self.page_bytes = page_bytes
        self.capacity = capacity
        self.moved_bytes = 0
        self.moved_s = 0.0
        self._below = below
        self._pinned = pinned
        self._frames: OrderedDict[int, Tensor] = OrderedDict()  # page -> uint8 [page_bytes], least recently used first
        self._dirty: set[int] = set()  # pages newer here than below
        self._used: dict[int, torch.cuda.Event] = {}  # page -> when the kernels given its frame are done
        self._forwards = True
        self._worker: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def resident_bytes(self) -> int:
        """Bytes of the frames in this device's memory."""
        return len(self._frames) * self.page_bytes

    def sweep(self, pages: Sequence[int], *, change: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Yield each page with its frame, fetching the next one meanwhile; every second sweep runs backwards.

        Args:
            pages: page numbers in ascending order.
            change: whether the caller writes to the frames; if not, they need not be written back.
        Yields: page number; frame uint8 ``[page_bytes]``, valid until the next one is asked for.
        """
        order = list(pages if self._forwards else reversed(pages))
        self._forwards = not self._forwards
        coming = [self._ask(page) for page in order[:1]]
        for index, page in enumerate(order):
            frame = coming.pop().result()
            if change:
                self._dirty.add(page)
            coming = [self._ask(page) for page in order[index + 1 : index + 2]]
            try:
                yield page, frame
            finally:
                for future in coming:
                    future.exception()  # wait for it: worker and caller never touch the cache at once
                self._note_use(page)

    def read(self, page: int, frame: Tensor) -> bool:
        """As the tier below another: copy a page out."""
        if page not in self._frames and (self._below is None or not self._enter(page, fetch=True)):
            return False
        self._frames.move_to_end(page)
        _copy(self._frames[page], frame)
        return True

    def write(self, page: int, frame: Tensor) -> None:
        """As the tier below another: take a page over."""
        if page not in self._frames:
            self._enter(page, fetch=False)
        self._frames.move_to_end(page)
        _copy(frame, self._frames[page])
        self._dirty.add(page)

    def flush(self) -> None:
        """Bring the tier below up to date; the frames stay."""
        if self._below is not None:
            for page in sorted(self._dirty):
                self._write_back(page, self._below)

    def evict(self) -> int:
        """Move all pages to the tier below and release their memory.

        Returns: the bytes released; 0 when there is no tier below.
        """
        if self._below is None:
            return 0
        self.flush()
        for event in self._used.values():
            event.synchronize()  # the allocator must not hand out memory that a kernel still reads
        released = self.resident_bytes
        self._frames.clear()
        self._used.clear()
        return released

    def _ask(self, page: int) -> "Future[Tensor]":
        """Start to bring a page in: in place when nothing has to move, else on the worker."""
        if page in self._frames or self._below is None:
            done: Future[Tensor] = Future()
            done.set_result(self._bring(page))
            return done
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longfit-paging")
        return self._worker.submit(self._bring, page)

    def _bring(self, page: int) -> Tensor:
        if page not in self._frames:
            self._enter(page, fetch=True)
        self._frames.move_to_end(page)
        return self._frames[page]

    def _enter(self, page: int, *, fetch: bool) -> bool:
        """Give a page a frame, filled from below or with zeros; return whether it came from below.

        Whatever fails, no page loses its contents: one that leaves is written before its frame is reused.
        """
        with self._on_stream():
            frame, clean = self._free_frame()
            begin = time.perf_counter()
            found = fetch and self._below is not None and self._below.read(page, frame)
            if found:
                self._count(begin)
            elif not clean:
                frame.zero_()
            if self._stream is not None:
                self._stream.synchronize()
        self._frames[page] = frame
        return found

    def _free_frame(self) -> tuple[Tensor, bool]:
        """Return a new frame of zeros, or that of the least recently used page; and whether it is new."""
        if self.capacity is None or len(self._frames) < self.capacity:
            try:
                frame = torch.zeros(self.page_bytes, dtype=torch.uint8, device=self.device, pin_memory=self._pinned)
                return frame, True
            except torch.OutOfMemoryError:
                if self._below is None or len(self._frames) < SMALLEST_CAPACITY:
                    raise
                self.capacity = len(self._frames)  # the device has no more: live with what there is
        assert self._below is not None
        page = next(iter(self._frames))
        self._await_use(page)
        if page in self._dirty:
            self._write_back(page, self._below)
        self._used.pop(page, None)
        return self._frames.pop(page), False

    def _write_back(self, page: int, below: Tier) -> None:
        begin = time.perf_counter()
        with self._on_stream():
            self._await_use(page)
            below.write(page, self._frames[page])
        self._dirty.discard(page)
        self._count(begin)

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def _note_use(self, page: int) -> None:
        if self._stream is not None:
            self._used[page] = torch.cuda.current_stream(self.device).record_event()

    def _await_use(self, page: int) -> None:
        """Let the copies that follow wait for the kernels that were given the page's frame."""
        if self._stream is not None and page in self._used:
            self._stream.wait_event(self._used[page])

    def _count(self, begin: float) -> None:
        self.moved_bytes += self.page_bytes
        self.moved_s += time.perf_counter() - begin


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy a frame. To or from an accelerator it runs on the current stream, that of the tier above, and is waited for.

    The one that waits is the paging thread: kernels on the page in use go on beside the copy.
    """
    target.copy_(source, non_blocking=source.is_cuda or target.is_cuda)
    for frame in (source, target):
        if frame.is_cuda:
            torch.cuda.current_stream(frame.device).synchronize()
