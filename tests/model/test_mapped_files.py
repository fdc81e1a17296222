"""What is read of a mapped file leaves memory again, and what is kept of it does not hold the file."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import longfit
from longfit.model.mapped_files import MAPS, copy_out, give_back

pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="this system does not say what is mapped")
MIB = 1 << 20


def resident_bytes(name: str) -> int:
    """Memory of this process that holds pages of files of this name."""
    total, here = 0, False
    for line in MAPS.with_name("smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            here = line.endswith(name)
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def test_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    file = tmp_path / "given_back.safetensors"
    save_file({"a": torch.arange(MIB, dtype=torch.float32), "b": torch.ones(MIB)}, file)
    with safe_open(file, "pt") as opened:
        a, b = opened.get_tensor("a"), opened.get_tensor("b")
    assert a.sum() > 0
    assert b.sum() == MIB
    assert resident_bytes(file.name) >= 8 * MIB
    give_back(a)
    assert resident_bytes(file.name) <= 4 * MIB + (64 << 10), "of a, nothing but what it shares pages with is left"
    assert torch.equal(a, torch.arange(MIB, dtype=torch.float32))


def test_other_memory_is_left_alone() -> None:
    own = torch.ones(MIB)
    give_back(own)
    assert own.sum() == MIB


def test_copies_leave_the_file_and_stay_tied(tmp_path: Path) -> None:
    file = tmp_path / "copied_out.safetensors"
    save_file({"weight": torch.ones(MIB)}, file)
    with safe_open(file, "pt") as opened:
        weight = opened.get_tensor("weight")
    model = nn.Module()
    model.first, model.second = nn.Parameter(weight), nn.Parameter(weight)
    model.register_buffer("own", torch.ones(3))
    del weight
    copy_out(model)
    assert resident_bytes(file.name) == 0
    assert model.first.data_ptr() == model.second.data_ptr()
    assert torch.equal(model.first, torch.ones(MIB))
    assert torch.equal(model.own, torch.ones(3))


def test_a_loaded_model_holds_nothing_of_its_file(folder: Path) -> None:
    model, _ = longfit.load(str(folder), device="cpu")
    assert model.get_input_embeddings().weight.isfinite().all()
    assert resident_bytes(str(folder / "model.safetensors")) == 0
