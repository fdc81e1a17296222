"""Advice to the system about pages of a process's memory."""

import ctypes
from collections.abc import Callable


def madvise() -> Callable[[int, int, int], int]:
    """Return the C library's function: that of Python's mmap holds the interpreter's lock while the disk is read.

    It takes an address, a number of bytes and the advice (``mmap.MADV_...``), and returns 0 or sets ``errno``.
    """
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
