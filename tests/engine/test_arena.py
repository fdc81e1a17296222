"""Arenas: every byte comes back, space is used again, a full disk says so, 8 bits are admitted only when close."""

import errno
import os
import resource

import pytest
import torch
from tests.exact_norms import exact_norms
from tests.tiny_models import VOCABULARY, tiny_model

from longfit.engine.arena import FileArena, MemoryArena
from longfit.engine.arena_composed import EightBitArena, TieredArena
from longfit.engine.arena_pinned import PinnedArena
from longfit.engine.attention import attention_key
from longfit.engine.check import admit_arena, check_gradients
from longfit.errors import ModelError, PlanError


def tiered(folder):
    return TieredArena([(MemoryArena(copy=True), 3000), (FileArena(folder), 9000)], MemoryArena(copy=True))


ARENAS = {
    "kept": lambda folder: MemoryArena(),
    "copied": lambda folder: MemoryArena(copy=True),
    "file": FileArena,
    "tiered": tiered,
}


def layer_input(num_rows=2, num_tokens=37, size=20, dtype=torch.bfloat16, device="cpu"):
    values = torch.randint(0, 256, (num_rows, num_tokens, size * dtype.itemsize), dtype=torch.uint8)
    return values.to(device).view(dtype)  # every bit pattern, not-a-numbers included


def put_all(arena, x, tile):
    stay = arena.open(-(-x.shape[1] // tile))
    for index, part in enumerate(x.split(tile, 1)):
        stay.put(index, part)
        stay.settle(index)
        if not arena.aliases:
            part.view(torch.uint8).fill_(0xA5)  # the sweep writes the layer's output here
    return stay


def checksum(tensor):
    """Equal exactly when shape, dtype and bytes are."""
    return tuple(tensor.shape), tensor.dtype, tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


@pytest.mark.parametrize("name", ARENAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_byte_comes_back_in_any_order(name, dtype, tmp_path):
    arena, originals, stays = ARENAS[name](tmp_path), [], []
    for step in range(2):  # the second step uses the space of the first
        for _layer in range(3):
            x = layer_input(dtype=dtype)
            originals.append([checksum(part) for part in x.split(8, 1)])
            stays.append(put_all(arena, x, 8))
        for stay, expected in zip(stays[::-1], originals[::-1], strict=True):
            for index in (4, 0, 1, 3, 2, 0):
                stay.prefetch(index)
                assert checksum(stay.get(index)) == expected[index]
            stay.close()
        if name == "file":
            assert arena.num_bytes == 3 * 2 * 37 * 20 * dtype.itemsize, f"step {step}"
        if name == "tiered":
            assert arena.left == [3000, 9000]
        stays, originals = [], []


def test_a_forgotten_stay_gives_its_space_back(tmp_path):
    arena = FileArena(tmp_path)
    for _ in range(3):
        stay = put_all(arena, layer_input(), 8)
        del stay  # a loss that was never differentiated
    assert arena.num_bytes == 2 * 37 * 20 * 2


def test_the_file_has_no_name_and_is_no_memory_of_the_process(tmp_path):
    arena = FileArena(tmp_path)
    assert list(tmp_path.iterdir()) == []
    x = torch.zeros(1, 1 << 10, 1 << 11, dtype=torch.bfloat16)  # 4 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stays = [put_all(arena, x.clone(), 256) for _ in range(16)]
    for stay in stays:
        for index in range(4):
            stay.get(index)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert arena.num_bytes == 16 * 4 << 20
    assert grown < 32 << 20  # 64 MiB are in the file; a clone and a few tiles are in memory
    arena.close()


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    arena = FileArena(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlanError, match="name another folder, or shorten the context"):
        put_all(arena, layer_input(), 8)


def test_a_truncated_file_is_noticed(tmp_path):
    arena = FileArena(tmp_path)
    stay = put_all(arena, layer_input(), 8)
    arena._file.truncate(10)
    with pytest.raises(PlanError, match="truncated"):
        stay.get(3)


def test_a_kept_input_that_changes_is_noticed():
    x = layer_input()
    stay = put_all(MemoryArena(), x, 8)
    x.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        stay.get(0)


def test_a_tier_must_not_keep_the_tensors_themselves():
    with pytest.raises(ValueError, match=r"MemoryArena\(copy=True\)"):
        TieredArena([(MemoryArena(), 100)], MemoryArena(copy=True))


# ------------------------------------------------------------------------------------------------ 8 bits
@pytest.mark.parametrize("size", [1, 127, 128, 300])
def test_eight_bits_are_off_by_half_a_step_of_their_block(size):
    x = torch.randn(2, 9, size).to(torch.bfloat16)
    x[..., 0] *= 100.0  # the large channel of a language model
    x[0, 3] = 0.0
    stay = EightBitArena(MemoryArena()).open(2)
    for index, part in enumerate(x.split(5, 1)):
        stay.put(index, part.clone())
    got = torch.cat([stay.get(0), stay.get(1)], 1)
    assert got.dtype == x.dtype
    for got_block, block in zip(got.double().split(128, -1), x.double().split(128, -1), strict=True):
        largest = block.abs().amax(-1, keepdim=True)
        # half a step of 1/127, and half a unit of bf16 (2^-9) of the result
        assert ((got_block - block).abs() <= largest * (0.5 / 127 + 2**-8)).all()
    assert not got[0, 3].any()


def test_eight_bits_are_admitted_by_their_gradients_only():
    model = tiny_model("llama", dtype=torch.float32, attn_implementation=attention_key())
    ids = torch.randint(3, VOCABULARY, (2, 30))
    arena = EightBitArena(MemoryArena())
    report = admit_arena(model, ids, arena, tolerance=0.1)
    assert report.worst[1] > 1e-4, "8 bits must show in the gradients, or the check sees nothing"
    with pytest.raises(ModelError, match="keep layer inputs exact"):
        admit_arena(model, ids, arena, tolerance=1e-5)


# ------------------------------------------------------------------------------------------------ in the sweep
@pytest.mark.parametrize("name", ["copied", "file", "tiered"])
def test_the_sweep_stays_exact(name, tmp_path):
    model = exact_norms(tiny_model("gemma2", num_hidden_layers=3, attn_implementation=attention_key("shifted", 8)))
    report = check_gradients(model, torch.randint(3, VOCABULARY, (2, 29)), tile=6, arena=ARENAS[name](tmp_path))
    # float64, some thousand terms in another order
    assert report.worst[1] < 1e-12


# ------------------------------------------------------------------------------------------------ CUDA
@pytest.mark.gpu
def test_pinned_memory_keeps_every_byte_without_waiting():
    arena = PinnedArena()
    for _step in range(20):
        x = layer_input(2, 4096, 1024, device="cuda")
        expected = [checksum(part) for part in x.split(500, 1)]
        stay = put_all(arena, x, 500)
        for index in reversed(range(9)):
            stay.prefetch(max(index - 1, 0))
            assert checksum(stay.get(index)) == expected[index]
        stay.close()
    assert len(arena._free[2 * 500 * 1024 * 2]) == 9  # a slab of exactly this size for each tile, used twenty times


@pytest.mark.gpu
def test_the_sweep_on_cuda_with_pinned_memory_is_exact():
    model = tiny_model("llama", num_hidden_layers=4, attn_implementation=attention_key()).cuda()
    report = check_gradients(exact_norms(model), torch.randint(3, VOCABULARY, (2, 300)).cuda(), arena=PinnedArena())
    assert report.worst[1] < 1e-11
