"""Freed memory goes back to the system."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

HOLES = """
from pathlib import Path
import torch
from longfit.engine.heap import give_back

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024

torch.zeros(24 << 20, dtype=torch.uint8)  # a freed block raises glibc's limit: smaller ones come from the heap now
blocks = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(16)]
del blocks[1::2]  # 32 MiB of holes, none at the end of the heap
before = resident()
give_back(torch.device("cuda"))
untouched = resident()
give_back(torch.device("cpu"))
print(before - untouched, before - resident(), sum(int(block.sum()) for block in blocks))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="holes are given back where glibc keeps them")
def test_holes_of_the_heap_are_given_back() -> None:
    source = str(Path(__file__).parents[2] / "src")
    code = f"import sys; sys.path.insert(0, {source!r})\n{HOLES}"
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    elsewhere, here, kept = map(int, words)
    assert elsewhere == 0
    assert here >= 28 << 20  # of 32 MiB; each hole may keep a page at either end
    assert kept == 8 * (4 << 20)  # what is alive stays as it is
