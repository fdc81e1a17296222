"""Advice about a page is taken, and a wrong address is told by errno."""

import ctypes
import errno
import mmap
import sys

import pytest

from longfit.files.memory_advice import madvise


@pytest.mark.skipif(sys.platform != "linux", reason="other systems answer in other ways")
def test_a_page_that_is_not_needed_is_zero_again_and_no_page_is_an_error() -> None:
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[0], memory[mmap.PAGESIZE] = 1, 2
    assert madvise()(address, mmap.PAGESIZE, mmap.MADV_DONTNEED) == 0
    assert (memory[0], memory[mmap.PAGESIZE]) == (0, 2)
    assert madvise()(address + 1, mmap.PAGESIZE, mmap.MADV_DONTNEED) == -1
    assert ctypes.get_errno() == errno.EINVAL
