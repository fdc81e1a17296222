"""Pages of optimiser state moving between tiers: accelerator, pinned host memory, file (QLoRA, section 3).

The paper calls it "Paged Optimizers". A ``PageCache`` keeps at most so many pages in one device's memory and sends the
others to the tier below. Tiers stack, and the file is the last:

    PageCache(cuda, budget)  over  PageCache(pinned host, host budget)  over  PageFile
    PageCache(cpu, budget)   over  PageFile

An optimiser's pass over its pages is a ``sweep``: while one page is updated, a worker thread writes the pages that must
leave and reads the two that come next. Which ones leave? First those that this sweep does not need: they have not been
used for a whole step. Then the page that was finished last: every second sweep runs backwards, so it is needed later
than any other that is left (Belady's rule), and the pages a sweep ends with are those the next one begins with. So the
share of the state that the budget holds is not moved at all, where least-recently-used would evict every page just
before its turn; and the three frames in motion stay in the processor's cache, which makes their copies a third faster
than those through frames that have grown cold.

What it is not: managed memory. bitsandbytes pages with ``cudaMallocManaged``: whole tensors, those above 100,000
elements only, moved by the driver's faults, with a device synchronisation after every parameter. Here copies are
explicit, on their own stream, of one size, and for every parameter.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.errors import ConfigError, PagingError
from longfit.optim.frames import Frames, copy_frame
from longfit.optim.mapped_frames import MappedFrames

# While one frame is updated another is filled.
SMALLEST_CAPACITY = 2

# Pages on their way at once: with one, the worker would wait for the caller after each.
_LOOK_AHEAD = 2


@dataclass
class _Move:
    """A page on its way in, and the one that makes room for it. The worker fills in what has happened."""

    page: int
    leaving: int | None
    write: bool  # whether the leaving page has changed
    frame: Tensor | None = None  # of the leaving page
    left: bool = False
    copied: int = 0  # pages
    seconds: float = 0.0


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

    def __init__(self, frames: Frames | MappedFrames, *, capacity: int | None = None) -> None:
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
        self._forwards = True
        self._in_use: set[int] = set()
        self._promised: set[int] = set()  # pages here that the sweep will come to next
        self._moves: dict[int, tuple[_Move, Future[Tensor]]] = {}  # page on its way -> its move
        self._worker: ThreadPoolExecutor | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pages in this device's memory."""
        return len(self._frames) * self._memory.page_bytes

    def sweep(self, pages: Sequence[int], *, change: bool = True) -> Iterator[list[tuple[int, Tensor]]]:
        """Yield the pages in batches, fetching the next ones meanwhile; pages that are here come together.

        Args:
            pages: page numbers, in ascending order; every second sweep turns it round.
            change: whether the caller writes to the frames.
        Yields: page numbers with their frames, uint8 ``[page_bytes]``, valid until the next batch is asked for.
        """
        wanted, ahead, coming = set(pages), deque(pages if self._forwards else reversed(pages)), deque[int]()
        self._forwards = not self._forwards
        self._idle = [page for page in self._frames if page not in wanted]
        try:
            while ahead or coming:
                self._look_ahead(ahead, coming)
                batch = self._take_batch(coming, ahead)
                self._in_use = {page for page, _ in batch}
                self._promised -= self._in_use
                if change:
                    self._changed |= self._in_use
                self._look_ahead(ahead, coming)
                yield batch
                self._finish_batch()
        finally:
            self._finish_batch()
            self._promised.clear()
            wait([future for _, future in self._moves.values()])
            for page in list(self._moves):
                self._settle(page)

    def _look_ahead(self, ahead: deque[int], coming: deque[int]) -> None:
        """Promise the pages that are here, and set those that are not on their way, as far as there is room."""
        while ahead:
            page = ahead[0]
            if page in self._frames and not self._is_leaving(page):
                self._promised.add(page)
            elif not self._memory.can_leave:
                self._bring(page)
                self._promised.add(page)
            elif len(self._moves) >= _LOOK_AHEAD or not self._set_on_its_way(page):
                return
            coming.append(ahead.popleft())

    def _take_batch(self, coming: deque[int], ahead: deque[int]) -> list[tuple[int, Tensor]]:
        """Wait for the next page; take those after it that are here by then."""
        batch = [coming.popleft() if coming else ahead.popleft()]
        frames = [self._await(batch[0])]
        while coming and (coming[0] not in self._moves or self._has_arrived(coming[0])):
            batch.append(coming.popleft())
            frames.append(self._await(batch[-1]))
        return list(zip(batch, frames, strict=True))

    def _finish_batch(self) -> None:
        for page in self._in_use:
            self._memory.note_use(page)
            self._frames.move_to_end(page)
        self._in_use = set()

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
            begin = time.perf_counter()
            self._memory.store(page, self._frames[page])
            self._changed.discard(page)
            self.moved_bytes += self._memory.page_bytes
            self.moved_s += time.perf_counter() - begin

    def evict(self) -> int:
        """Send all pages to the tier below and release their memory.

        Returns: the bytes released; 0 where there is no tier below.
        """
        if not self._memory.can_leave:
            return 0
        self.flush()
        released = self.resident_bytes
        for page, frame in self._frames.items():
            self._memory.leave(page, frame)
        self._frames.clear()
        self._memory.release()
        return released

    def let_go_of_committed(self) -> None:
        """After the file's commit: a page that lies in the file itself must enter again, in another slot, to change."""
        if self._memory.in_file:
            self.evict()

    def _set_on_its_way(self, page: int) -> bool:
        """Start to bring a page in on the worker; False if no page may leave for it now."""
        leaving = None
        entering = sum(move.leaving is None for move, _ in self._moves.values())
        if self.capacity is not None and len(self._frames) + entering >= self.capacity:
            leaving = self._choose_leaving(self._in_use | self._promised)
            if leaving is None:
                return False
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longfit-paging")
        move = self._new_move(page, leaving)
        try:
            future = self._worker.submit(self._carry_out, move)
        except (RuntimeError, MemoryError) as error:
            self._worker = None  # its queue has the move already
            raise PagingError(
                "could not start the thread that moves pages: this process may not have so much memory; raise the "
                "limit (ulimit -v)"
            ) from error
        self._moves[page] = move, future
        return True

    def _await(self, page: int) -> Tensor:
        """Return the frame of a page that is here, on its way, or still below."""
        if page in self._moves:
            _, future = self._moves[page]
            error = future.exception()
            self._settle(page)
            if isinstance(error, torch.OutOfMemoryError):
                self._lower_capacity(error)
            elif error is not None:
                raise error
        return self._bring(page)

    def _bring(self, page: int) -> Tensor:
        """Return a page's frame, bringing it in at once if need be."""
        if page not in self._frames:
            try:
                self._exchange(page)
            except torch.OutOfMemoryError as error:
                self._lower_capacity(error)
                self._exchange(page)
        self._frames.move_to_end(page)
        return self._frames[page]

    def _exchange(self, page: int) -> None:
        full = self.capacity is not None and len(self._frames) >= self.capacity
        move = self._new_move(page, self._choose_leaving(self._in_use) if full else None)
        try:
            frame = self._carry_out(move)
        finally:
            self._note_left(move)
        self._frames[page] = frame

    def _lower_capacity(self, error: torch.OutOfMemoryError) -> None:
        """The device has no more memory: live with what there is, if that is enough."""
        if not self._memory.can_leave or len(self._frames) < SMALLEST_CAPACITY:
            raise error
        self.capacity = len(self._frames)

    def _choose_leaving(self, kept: set[int]) -> int | None:
        """Return an idle page or else the one that was finished last, not of ``kept`` and not leaving already."""
        while self._idle:
            page = self._idle.pop()
            if page in self._frames and page not in kept and not self._is_leaving(page):
                return page
        candidates = (page for page in reversed(self._frames) if page not in kept and not self._is_leaving(page))
        return next(candidates, None)

    def _is_leaving(self, page: int) -> bool:
        return any(move.leaving == page for move, _ in self._moves.values())

    def _has_arrived(self, page: int) -> bool:
        _, future = self._moves[page]
        return future.done() and future.exception() is None

    def _new_move(self, page: int, leaving: int | None) -> _Move:
        if leaving is None:
            return _Move(page, None, write=False)
        return _Move(page, leaving, leaving in self._changed, self._frames[leaving])

    def _carry_out(self, move: _Move) -> Tensor:
        """Write the page that leaves, then read the one that comes; whatever fails, neither loses its contents."""
        begin = time.perf_counter()
        if move.leaving is not None and move.frame is not None:
            if move.write:
                self._memory.store(move.leaving, move.frame)
                move.copied += 1
            self._memory.leave(move.leaving, move.frame)
            move.left = True
        frame, copied = self._memory.enter(move.page)
        move.copied += copied
        if move.copied:
            move.seconds = time.perf_counter() - begin
        return frame

    def _settle(self, page: int) -> None:
        """Enter what a move has done into the books; only the caller's thread writes them."""
        move, future = self._moves.pop(page)
        self._note_left(move)
        if future.exception() is None:
            self._frames[page] = future.result()

    def _note_left(self, move: _Move) -> None:
        if move.left and move.leaving is not None:
            del self._frames[move.leaving]
            self._changed.discard(move.leaving)
        self.moved_bytes += move.copied * self._memory.page_bytes
        self.moved_s += move.seconds
