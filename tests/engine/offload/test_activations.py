"""Where layer inputs wait: every byte comes back, space is used again, a full disk says so."""

import errno
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from tests.exact_norms import exact_norms
from tests.tiny_models import VOCABULARY, tiny_model

from longfit.attention.hf_attention import attention_key
from longfit.engine.gradient_check import check_gradients
from longfit.engine.offload.activations import DeviceActivations, FileActivations
from longfit.engine.offload.pinned_activations import PinnedActivations
from longfit.engine.offload.pinned_memory import PinnedMemory
from longfit.errors import PlanError

OFFLOADS = {
    "kept": lambda folder: DeviceActivations(),
    "copied": lambda folder: DeviceActivations(copy=True),
    "file": FileActivations,
}


def layer_input(num_rows=2, num_tokens=37, size=20, dtype=torch.bfloat16, device="cpu"):
    values = torch.randint(0, 256, (num_rows, num_tokens, size * dtype.itemsize), dtype=torch.uint8)
    return values.to(device).view(dtype)  # every bit pattern, not-a-numbers included


def put_all(offload, x, tile):
    saved_input = offload.open(-(-x.shape[1] // tile))
    for index, part in enumerate(x.split(tile, 1)):
        saved_input.put(index, part)
        saved_input.settle(index)
        if not offload.aliases:
            part.view(torch.uint8).fill_(0xA5)  # the sweep writes the layer's output here
    return saved_input


def checksum(tensor):
    """Equal exactly when shape, dtype and bytes are."""
    return tuple(tensor.shape), tensor.dtype, tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


@pytest.mark.parametrize("name", OFFLOADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_byte_comes_back_in_any_order(name, dtype, tmp_path):
    offload, originals, saved_inputs = OFFLOADS[name](tmp_path), [], []
    for step in range(2):  # the second step uses the space of the first
        for _layer in range(3):
            x = layer_input(dtype=dtype)
            originals.append([checksum(part) for part in x.split(8, 1)])
            saved_inputs.append(put_all(offload, x, 8))
        for saved_input, expected in zip(saved_inputs[::-1], originals[::-1], strict=True):
            for index in (4, 0, 1, 3, 2, 0):
                saved_input.prefetch(index)
                assert checksum(saved_input.get(index)) == expected[index]
            saved_input.close()
        if name == "file":
            assert offload.num_bytes == 3 * 2 * 37 * 20 * dtype.itemsize, f"step {step}"
        if name == "tiered":
            assert offload.left == [3000, 9000]
        saved_inputs, originals = [], []


def test_a_forgotten_stay_gives_its_space_back(tmp_path):
    offload = FileActivations(tmp_path)
    for _ in range(3):
        saved_input = put_all(offload, layer_input(), 8)
        del saved_input  # a loss that was never differentiated
    assert offload.num_bytes == 2 * 37 * 20 * 2


def test_the_file_has_no_name_and_is_no_memory_of_the_process(tmp_path):
    offload = FileActivations(tmp_path)
    assert list(tmp_path.iterdir()) == []
    x = torch.zeros(1, 1 << 10, 1 << 11, dtype=torch.bfloat16)  # 4 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    saved_inputs = [put_all(offload, x.clone(), 256) for _ in range(16)]
    for saved_input in saved_inputs:
        for index in range(4):
            saved_input.get(index)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert offload.num_bytes == 16 * 4 << 20
    assert grown < 32 << 20  # 64 MiB are in the file; a clone and a few tiles are in memory
    offload.close()


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    offload = FileActivations(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlanError, match="name another folder, or shorten the context"):
        put_all(offload, layer_input(), 8)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to find a file without a name")
def test_a_truncated_file_is_noticed(tmp_path):
    offload = FileActivations(tmp_path)
    saved_input = put_all(offload, layer_input(), 8)
    (open_file,) = (fd for fd in Path("/proc/self/fd").iterdir() if os.path.realpath(fd).startswith(str(tmp_path)))
    os.truncate(open_file, 10)
    with pytest.raises(PlanError, match="truncated"):
        saved_input.get(3)


def test_a_kept_input_that_changes_is_noticed():
    x = layer_input()
    saved_input = put_all(DeviceActivations(), x, 8)
    x.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        saved_input.get(0)


# ------------------------------------------------------------------------------------------------ in the sweep
@pytest.mark.parametrize("name", ["copied", "file"])
def test_the_sweep_stays_exact(name, tmp_path):
    model = exact_norms(tiny_model("gemma2", num_hidden_layers=3, attn_implementation=attention_key("shifted", 8)))
    report = check_gradients(model, torch.randint(3, VOCABULARY, (2, 29)), tile=6, offload=OFFLOADS[name](tmp_path))
    # float64, some thousand terms in another order
    assert report.worst[1] < 1e-12


# ------------------------------------------------------------------------------------------------ CUDA
@pytest.mark.gpu
def test_pinned_memory_keeps_every_byte_without_waiting(monkeypatch):
    offload, make, slabs = PinnedActivations(), PinnedMemory.slab, []
    monkeypatch.setattr(PinnedMemory, "slab", lambda memory, size: slabs.append(size) or make(memory, size))
    for _step in range(20):
        x = layer_input(2, 4096, 1024, device="cuda")
        expected = [checksum(part) for part in x.split(500, 1)]
        saved_input = put_all(offload, x, 500)
        for index in reversed(range(9)):
            saved_input.prefetch(max(index - 1, 0))
            assert checksum(saved_input.get(index)) == expected[index]
        saved_input.close()
    assert slabs == [2 * 500 * 1024 * 2] * 9  # a slab of exactly this size for each tile, used twenty times


@pytest.mark.gpu
def test_the_sweep_on_cuda_with_pinned_memory_is_exact():
    model = tiny_model("llama", num_hidden_layers=4, attn_implementation=attention_key()).cuda()
    report = check_gradients(
        exact_norms(model), torch.randint(3, VOCABULARY, (2, 300)).cuda(), offload=PinnedActivations()
    )
    assert report.worst[1] < 1e-11
