"""Parts of an open file: reserved before they are needed, written whole and read whole.

A call of the system may write or read less than it was asked to, and a file may grow beyond what the disk can hold; who
keeps data in parts of a file (``engine/offload/activations.py``, ``optim/page_file.py``) has both settled here.
"""

import os
import sys


def reserve(file: int, offset: int, num_bytes: int) -> None:
    """Make sure that the disk has room for a part, so that a full disk shows now. Raises: OSError."""
    if sys.platform == "linux":
        os.posix_fallocate(file, offset, num_bytes)
    else:  # no such call: only writing makes sure
        write(file, offset, memoryview(bytes(num_bytes)))


def write(file: int, offset: int, data: memoryview) -> None:
    """Write all of ``data``. Raises: OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


def read(file: int, offset: int, data: memoryview) -> int:
    """Fill ``data``; returns how many bytes there were, fewer only where the file ends. Raises: OSError."""
    done = 0
    while done < len(data):
        got = os.preadv(file, [data[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done
