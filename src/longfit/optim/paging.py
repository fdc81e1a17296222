"""Pages of optimiser state moving between tiers: accelerator, pinned host memory, file (QLoRA, section 3).

The paper calls it "Paged Optimizers". A ``PageCache`` keeps at most so many pages in one device's memory and sends the
others to the tier below. Tiers stack, and the file is the last:

    PageCache(cuda, budget)  over  PageCache(pinned host, host budget)  over  PageFile
    PageCache(cpu, budget)   over  PageFile

An optimiser's pass over its pages is a ``sweep``: while one page is updated, a worker thread writes the page that must
leave and reads the one that comes next. Which one leaves? First any page that this sweep does not need: it has not been
used for a whole step. Then the page that was just finished, for in a loop it is the one needed last (Belady's rule);
least-recently-used would evict every page just before its turn. So the share of the state that the budget holds is
never moved, and the two frames in motion stay in the processor's cache, which makes their copies half as long again
as fast (14 and 17 GB/s here, 9 and 11 through cold frames).

What it is not: managed memory. bitsandbytes pages with ``cudaMallocManaged``: whole tensors, those above 100,000
elements only, moved by the driver's faults, with a device synchronisation after every parameter. Here copies are
explicit, on their own stream, of one size, and for every parameter.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from longfit.errors import ConfigError
from longfit.optim.frames import Frames, copy_frame

# While one frame is updated the other is filled.
SMALLEST_CAPACITY = 2


class PageCache:
    """The pages that are in one device's memory, and the way to those that are not.

    Args:
        frames: the memory, and the tier below.
        capacity: pages at most; None: all that are asked for.
    Raises:
        ConfigError: the capacity is below two, or limited with no tier below.

    Attributes:
        moved_bytes, moved_s: what was copied in and out, and the seconds that took, most of them beside the update.
    """

    def __init__(self, frames: Frames, *, capacity: int | None = None) -> None:
        if capacity is not None and capacity < SMALLEST_CAPACITY:
            raise ConfigError(
                f"the budget holds {capacity} page(s) of {frames.page_bytes} bytes; allowed: at least "
                f"{SMALLEST_CAPACITY}, one in use and one on its way; give {SMALLEST_CAPACITY * frames.page_bytes} "
                "bytes or a smaller page_bytes"
            )
        if capacity is not None and not frames.can_leave:
            raise ConfigError("a budget on a CPU: the other pages need somewhere to be; give path= for a page file")
        self.capacity = capacity
        self.moved_bytes = 0
        self.moved_s = 0.0
        self._memory = frames
        self._frames: OrderedDict[int, Tensor] = OrderedDict()  # page -> uint8 [page_bytes], least recently used first
        self._changed: set[int] = set()  # pages newer here than below
        self._idle: list[int] = []  # pages that the sweep under way does not need
        self._in_use: set[int] = set()
        self._worker: ThreadPoolExecutor | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pages in this device's memory."""
        return len(self._frames) * self._memory.page_bytes

    def sweep(self, pages: Sequence[int], *, change: bool = True) -> Iterator[list[tuple[int, Tensor]]]:
        """Yield the pages in batches, fetching the next page meanwhile; pages that are here come together.

        Args:
            pages: page numbers, in the same order in every sweep.
            change: whether the caller writes to the frames.
        Yields: page numbers with their frames, uint8 ``[page_bytes]``, valid until the next batch is asked for.
        """
        wanted = set(pages)
        self._idle = [page for page in self._frames if page not in wanted]
        position = 0
        coming = self._ask(pages[0]) if pages else None
        while coming is not None:
            batch = [(pages[position], coming.result())]
            position += 1
            while position < len(pages) and self._joins(pages[position], len(batch)):
                batch.append((pages[position], self._bring(pages[position])))
                position += 1
            self._in_use = {page for page, _ in batch}
            if change:
                self._changed |= self._in_use
            coming = self._ask(pages[position]) if position < len(pages) else None
            try:
                yield batch
            finally:
                if coming is not None:
                    coming.exception()  # wait for it: worker and caller never touch the cache at once
                for page in self._in_use:
                    self._memory.note_use(page)
                self._in_use = set()

    def _joins(self, page: int, batched: int) -> bool:
        """Whether a page need not move, and another one can still leave while the batch is in use."""
        if not self._memory.can_leave:
            return True
        return page in self._frames and (self.capacity is None or batched < self.capacity - 1)

    def read(self, page: int, frame: Tensor) -> bool:
        """As the tier below another: copy a page out; a page that is nowhere yet is zeros."""
        copy_frame(self._bring(page), frame)
        return True

    def write(self, page: int, frame: Tensor) -> None:
        """As the tier below another: take a page over."""
        copy_frame(frame, self._bring(page))
        self._changed.add(page)

    def flush(self) -> None:
        """Bring the tier below up to date; the pages stay."""
        for page in sorted(self._changed):
            self._memory.store(page, self._frames[page])
        self._changed.clear()

    def evict(self) -> int:
        """Send all pages to the tier below and release their memory.

        Returns: the bytes released; 0 where there is no tier below.
        """
        if not self._memory.can_leave:
            return 0
        released = self.resident_bytes
        while self._frames:
            self._send_away()
        self._memory.release()
        return released

    def _ask(self, page: int) -> "Future[Tensor]":
        """Start to bring a page in: at once when nothing has to move, else on the worker."""
        if page in self._frames or not self._memory.can_leave:
            done: Future[Tensor] = Future()
            done.set_result(self._bring(page))
            return done
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longfit-paging")
        return self._worker.submit(self._bring, page)

    def _bring(self, page: int) -> Tensor:
        """Return a page's frame. Whatever fails, no page loses its contents."""
        if page not in self._frames:
            if self.capacity is not None and len(self._frames) >= self.capacity:
                self._send_away()
            self._frames[page] = self._enter(page)
        self._frames.move_to_end(page)
        return self._frames[page]

    def _enter(self, page: int) -> Tensor:
        begin = time.perf_counter()
        try:
            frame, copied = self._memory.enter(page)
        except torch.OutOfMemoryError:
            if not self._memory.can_leave or len(self._frames) < SMALLEST_CAPACITY:
                raise
            self.capacity = len(self._frames)  # the device has no more: live with what there is
            self._send_away()
            frame, copied = self._memory.enter(page)
        if copied:
            self._count(begin)
        return frame

    def _send_away(self) -> None:
        """Let a page leave, written first if it has changed: an idle one, or the one that was finished last."""
        if self._idle:
            page = self._idle[-1]
        else:
            page = next(page for page in reversed(self._frames) if page not in self._in_use)
        frame = self._frames[page]
        if page in self._changed:
            begin = time.perf_counter()
            self._memory.store(page, frame)
            self._count(begin)
            self._changed.discard(page)
        del self._frames[page]
        if self._idle:
            self._idle.pop()
        self._memory.leave(page, frame)

    def _count(self, begin: float) -> None:
        self.moved_bytes += self._memory.page_bytes
        self.moved_s += time.perf_counter() - begin
