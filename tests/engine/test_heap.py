"""The heap's holes go back to the system."""

import platform
from pathlib import Path

import pytest
import torch

from longfit.engine.host_memory import give_back


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps holes")
def test_holes_are_given_back() -> None:
    # Blocks below glibc's smallest threshold for mappings lie in the heap; each second one stays and keeps it there.
    blocks = [torch.zeros(100 << 10, dtype=torch.uint8) for _ in range(640)]
    del blocks[::2]
    before = resident_bytes()
    give_back(torch.device("meta"))
    assert resident_bytes() == pytest.approx(before, abs=1 << 20)
    give_back(torch.device("cpu"))
    assert before - resident_bytes() > 25 << 20  # of 32 MB, less the pages that holes share with blocks
    assert all(int(block.sum()) == 0 for block in blocks)
