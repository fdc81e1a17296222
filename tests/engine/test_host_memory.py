"""Memory of its own for what outlives a tile: any shape, dtype and order of axes, and gone when nobody holds it."""

import platform
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longfit.engine import host_memory
from longfit.engine.host_memory import give_back

MANY = (3, host_memory.SMALLEST_BYTES // 4, 2)


def mapped_bytes():
    """Of this process, all mappings together."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [MANY, (2, 5), (0, 4), ()])
def test_an_empty_tensor_can_be_written(shape, dtype):
    like = torch.zeros(1, dtype=torch.float32)
    made = host_memory.empty(like, shape, dtype)
    assert made.shape == shape
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert made.fill_(1).sum() == made.numel()
    assert host_memory.empty(like, shape).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the bytes of the process from /proc")
def test_a_mapping_goes_back_to_the_system_as_a_whole():
    like = torch.zeros(1)
    made = [host_memory.empty(like, (1 << 20,)).zero_() for _ in range(16)]
    with_all = mapped_bytes()
    del made[::2]
    assert with_all - mapped_bytes() >= 8 * (4 << 20)
    assert all(part.sum() == 0 for part in made)


def test_tensors_without_memory_stay_so():
    with FakeTensorMode():
        assert host_memory.empty(torch.zeros(1), MANY).fake_mode is not None
    assert host_memory.empty(torch.zeros(1, device="meta"), MANY).device.type == "meta"


class Doubled(torch.autograd.Function):
    """As a swept layer: its output is a host_memory, or what it is given, written over."""

    @staticmethod
    def forward(ctx, x, over):
        out = x if over else host_memory.empty(x, tuple(x.shape))
        torch.mul(x, 2, out=out)
        if over:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, None


def test_a_layer_may_write_over_the_output_of_the_one_before():
    x = torch.ones(MANY, requires_grad=True)
    Doubled.apply(Doubled.apply(x, False), True).sum().backward()
    assert torch.equal(x.grad, torch.full(MANY, 4.0))


def test_no_memory_is_told_as_such():
    with pytest.raises(MemoryError, match=r"bytes for .* in torch\.float32: "):
        host_memory.empty(torch.zeros(1), (1 << 44,))


@pytest.mark.skipif(platform.system() != "Linux", reason="no /proc/self/statm")
def test_resident_memory_grows_with_what_is_touched_and_the_peak_is_no_smaller():
    before = host_memory.resident_bytes()
    held = torch.zeros(8 << 20).add_(1)  # 32 MiB
    after = host_memory.resident_bytes()
    assert 32 << 20 <= after - before < 64 << 20
    assert host_memory.peak_bytes() >= after - (1 << 20)  # the kernel counts by the page, and lags by a few
    assert held.sum() == held.numel()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps holes")
def test_holes_are_given_back_near_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks below glibc's smallest threshold for mappings lie in the heap; each second one stays and keeps it there.
    blocks = [torch.zeros(100 << 10, dtype=torch.uint8) for _ in range(640)]
    del blocks[::2]
    before = host_memory.resident_bytes()
    for device, peak in (("meta", before), ("cpu", int(before / 0.9))):  # another device; far below the peak
        monkeypatch.setattr(host_memory, "peak_bytes", lambda peak=peak: peak)
        give_back(torch.device(device))
        assert host_memory.resident_bytes() == pytest.approx(before, abs=1 << 20)
    monkeypatch.setattr(host_memory, "peak_bytes", lambda: before)
    give_back(torch.device("cpu"))
    assert before - host_memory.resident_bytes() > 25 << 20  # of 32 MB, less the pages that holes share with blocks
    assert all(int(block.sum()) == 0 for block in blocks)
