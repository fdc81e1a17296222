"""An adapter's file is read back and compared: what is not the adapter is no result."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.exporting.adapted import save_adapted

from longfit.errors import ExportError
from longfit.exporting import export as exporting
from longfit.exporting import gguf_lora
from longfit.exporting.export import export
from longfit.exporting.gguf_lora import take_over


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """``base`` and ``adapter`` of a Llama, whose query and key rows are interleaved in a file."""
    save_adapted(tmp_path, "llama")
    return tmp_path


def refused(place: Path, message: str, **options: Any) -> None:
    with pytest.raises(ExportError, match=message):
        export(place / "adapter", place / "out", format="gguf-lora", tokens=64, **options)
    assert {path.name for path in place.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"k_proj": 3}}),
        ("gemma2", {"use_rslora": True}),
        ("phi3", {}),
    ],
)
def test_what_is_right_is_within_the_bound(family: str, lora: dict[str, Any], tmp_path: Path) -> None:
    save_adapted(tmp_path, family, **lora)
    result = export(tmp_path / "adapter", tmp_path / "out", format="gguf-lora", tokens=64)
    trained, base, written = (row.kl for row in result.drift)
    assert trained == 0
    assert written <= result.proof.bound < base / 1000
    assert result.proof.kl == written


def test_rows_that_are_not_interleaved_are_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_lora, "to_gguf", lambda name, tensor, config, family: tensor)
    refused(place, r"B of .*[qk]_proj.weight is off by [\d.e-]+, rounding explains [\d.e-]+ at most", measure=False)


def test_a_wrong_scaling_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gguf_lora.GGUFWriter.add_float32
    monkeypatch.setattr(gguf_lora.GGUFWriter, "add_float32", lambda self, key, value: right(self, key, value * 1.001))
    refused(place, r"B of .* is off by [\d.e-]+, rounding explains", measure=False)


def test_a_value_that_changes_on_its_way_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gguf_lora.GGUFWriter.add_tensor

    def forgetful(self: Any, name: str, tensor: np.ndarray) -> None:
        tensor = tensor.copy()
        if name == "blk.1.ffn_up.weight.lora_a":
            tensor[3, 5] *= 1 + 2.0**-20
        right(self, name, tensor)

    monkeypatch.setattr(gguf_lora.GGUFWriter, "add_tensor", forgetful)
    refused(place, r"A of model.layers.1.mlp.up_proj.weight is off by .*, rounding explains 1.4e-45", measure=False)


def test_a_tensor_that_is_missing_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gguf_lora.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf_lora.GGUFWriter,
        "add_tensor",
        lambda self, name, tensor: None if "blk.1.ffn_up" in name else right(self, name, tensor),
    )
    refused(place, r"model.layers.1.mlp.up_proj.weight is in only one of the file and the adapter", measure=False)


def test_an_adapter_that_speaks_otherwise_is_no_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that pass one by one would still have to make the trained model."""

    def forgetful(model: Any, updates: dict[str, Any]) -> None:
        take_over(model, updates)
        model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").lora_B["default"].weight.data.mul_(0.9)

    monkeypatch.setattr(exporting, "take_over", forgetful)
    refused(place, r"is not the trained model: read back, it is .* nats a token .* explains .* at most")
