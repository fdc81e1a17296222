"""Frames: what a page finds when it enters, and the accelerator's streams."""

import pytest
import torch
from torch import Tensor

from longfit.errors import PagingError
from longfit.optim.frames import Frames, copy_frame

PAGE_BYTES = 4096


class Shelf:
    def __init__(self) -> None:
        self.pages: dict[int, Tensor] = {}

    def read(self, page: int, frame: Tensor) -> bool:
        if page in self.pages:
            copy_frame(self.pages[page], frame)
        return page in self.pages

    def write(self, page: int, frame: Tensor) -> None:
        self.pages[page] = torch.empty(PAGE_BYTES, dtype=torch.uint8)
        copy_frame(frame, self.pages[page])


def go_round(device: torch.device) -> None:
    frames = Frames(device, page_bytes=PAGE_BYTES, below=Shelf())
    first, copied = frames.enter(0)
    assert not copied
    assert not first.any(), "a new page is zeros"
    first.fill_(7)
    frames.note_use(0)
    frames.store(0, first)
    frames.leave(0, first)
    second, copied = frames.enter(1)
    assert second.data_ptr() == first.data_ptr(), "the frame is used again"
    assert not copied
    assert not second.any(), "and does not show what was in it"
    frames.leave(1, second)
    again, copied = frames.enter(0)
    assert copied
    assert again.unique().tolist() == [7]
    frames.leave(0, again)
    frames.release()


def test_pages_come_back_as_they_left() -> None:
    go_round(torch.device("cpu"))


def test_a_page_that_finds_no_memory_is_a_paging_error() -> None:
    with pytest.raises(PagingError, match=r"no memory for a page of .* lower optim\.budget, or raise the limit"):
        Frames(torch.device("cpu"), page_bytes=1 << 60).enter(0)


@pytest.mark.gpu
def test_pages_come_back_as_they_left_an_accelerator() -> None:
    go_round(torch.device("cuda"))


@pytest.mark.gpu
def test_a_page_is_stored_after_the_kernels_that_were_given_its_frame() -> None:
    frames = Frames(torch.device("cuda"), page_bytes=PAGE_BYTES, below=(shelf := Shelf()))
    frame, _ = frames.enter(0)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy.t() / 4096  # keeps the stream busy well beyond the launch of the copy
    frame.fill_(9)
    frames.note_use(0)
    frames.store(0, frame)
    assert shelf.pages[0].unique().tolist() == [9]
