"""The shared pieces of the experiments: cells are written at once and measured once; the text is really held out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.experiments import (
    data_types,
    extension,
    extension_cells,
    extension_page,
    qlora_vs_lora,
    shifted_attention,
    texts,
)
from benchmarks.experiments.cells import Cells
from torch import nn

from longfit.numerics.codebooks import codebook


class Letters:
    """One token a byte."""

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=np.frombuffer(text.encode(), np.uint8))


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path: Path) -> None:
    cells = [{"name": "a", "size": (1, 2)}, {"name": "b", "size": (1, 2)}, {"name": "c", "size": (3,)}]
    measured = []

    def measure(settings: Any) -> dict[str, Any]:
        measured.append(settings["name"])
        if measured == ["a", "b"]:
            raise KeyboardInterrupt
        return {"seen": settings["name"]}

    path = tmp_path / "new" / "found.json"
    with pytest.raises(KeyboardInterrupt):
        Cells(path).run(cells, measure)
    Cells(path).run(cells, measure)
    assert measured == ["a", "b", "b", "c"]
    again = Cells(path)
    assert [again.find(settings) for settings in cells] == [{"seen": name} for name in "abc"]
    assert [record["result"]["seen"] for record in again.select(size=(1, 2))] == ["a", "b"]
    assert again.find({"name": "a"}) is None, "fewer settings are another cell"


def test_nothing_held_out_is_trained_on() -> None:
    assert not set(texts.TRAINING_MODULES) & set(texts.HELD_OUT_MODULES)
    for documents in (data_types.SOURCES, qlora_vs_lora.DOCUMENTS, extension.LOOKED_AT):
        assert set(documents) <= set(texts.HELD_OUT_MODULES)
    for cell in extension_cells.all_cells():
        assert cell.get("document", "tarfile") in texts.HELD_OUT_MODULES


def test_training_windows_follow_from_the_seed_and_repeat_only_when_all_were_read() -> None:
    def read(seed: int, number: int) -> list[bytes]:
        windows = texts.training_windows(Letters(), window=50_000, number=number, seed=seed)
        assert all(window.shape == (50_000,) for window in windows)
        return [window.numpy().tobytes() for window in windows]

    few = read(0, 4)
    assert few == read(0, 4)
    assert few != read(1, 4)
    many = read(0, 100)
    assert many[:4] == few
    assert 4 < len(set(many)) < 100
    assert len(set(many[: len(set(many))])) == len(set(many))


def test_dithering_moves_weights_off_their_levels_by_less_than_half_a_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    step = torch.rand(8 * 2, 1)  # a step for each block of 32
    levels = torch.randint(0, 16, (8 * 2, 32))
    levels[:, 0], levels[:, 1] = 0, 15  # as in Q4_1, whose step is made from the extremes
    weight = (step * levels).view(8, 64)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_types, "quantizable_layers", lambda model: [model[0]])
        data_types.dither(model, seed=0)
    moved = ((model[0].weight - weight).view(-1, 32) / step).abs()
    # float32 knows a weight of 15 steps to 15 * 2**-24 steps; a few roundings
    assert moved.max() <= 0.5 + 1e-5
    assert 0.2 < moved.mean() < 0.3  # the mean of an even number in [0, 0.5] is 0.25; 512 of them are off by 0.006


def test_normal_weights_cost_what_theory_says() -> None:
    """INT4's relative error from its definition: an even error in each step of the block's largest weight."""
    found = data_types.normal_error(data_types.DataType("int4", 64))
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).view(-1, 64)
    scaled = weight / weight.abs().amax(1, keepdim=True)
    nearest = (scaled[..., None] - codebook("int4")).abs().amin(-1) * weight.abs().amax(1, keepdim=True)
    # float32 sums of a million terms, in another order
    assert found["relative_error"] == pytest.approx(float(nearest.norm() / weight.norm()), rel=1e-4)
    assert found["bits_per_param"] == 4 + 32 / 64


def test_buckets_are_joined_by_their_tokens() -> None:
    buckets = [
        {"start": 0, "stop": 2048, "num_tokens": 2047, "nll": 1.0},
        {"start": 2048, "stop": 4096, "num_tokens": 2048, "nll": 2.0},
        {"start": 4096, "stop": 6144, "num_tokens": 2048, "nll": 9.0},
    ]
    found = extension_page.mean_perplexity(buckets, 0, 4096)
    assert found == pytest.approx(2.718281828459045 ** ((2047 + 2 * 2048) / 4095), rel=1e-12)


def test_every_cell_of_every_table_is_different() -> None:
    for cells in (
        list(data_types.cells(1024)),
        list(qlora_vs_lora.cells(window=1024, steps=24)),
        list(extension_cells.all_cells()),
        list(shifted_attention.cells(shifted_attention.WINDOWS, 2)),
    ):
        assert len({repr(sorted(cell.items())) for cell in cells}) == len(cells)
