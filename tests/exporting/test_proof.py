"""What is not the trained model is no result: the command fails with the numbers and leaves nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.exporting.adapted import gpt2_rule, save_adapted
from tests.exporting.conftest import MakeRun

from longfit.errors import ExportError
from longfit.exporting import export as exporting
from longfit.exporting import merge_plan
from longfit.exporting.export import export
from longfit.exporting.merge import merge
from longfit.model.adapter_weights import AdapterWeights


@pytest.fixture(scope="module")
def spoken(make_run: MakeRun) -> Path:
    """A run whose tokenizer GGUF has, with YaRN."""
    return make_run(model__vocab_size=340, tokenizer=gpt2_rule(), context__context=128)


def test_a_merge_that_loses_the_adapter_of_a_layer_fails(spoken: Path, tmp_path: Path, monkeypatch) -> None:
    right = AdapterWeights.apply

    def forgetful(self: AdapterWeights, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight if name.endswith("layers.1.mlp.up_proj.weight") else right(self, name, weight)

    monkeypatch.setattr(merge_plan.AdapterWeights, "apply", forgetful)
    message = r"merged onto 4bit: is not the trained model: read back, it is .* nats a token .* explains .* at most"
    with pytest.raises(ExportError, match=message):
        merge(spoken, tmp_path / "merged", onto="4bit")
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_that_loses_the_positions_fails(tmp_path: Path, monkeypatch) -> None:
    save_adapted(tmp_path, "llama, yarn")
    right = exporting.metadata

    def unscaled(config: Any, family: Any) -> dict[str, Any]:
        return {key: field for key, field in right(config, family).items() if "rope.scaling" not in key}

    monkeypatch.setattr(exporting, "metadata", unscaled)
    with pytest.raises(ExportError, match="is not the trained model: read back"):
        export(tmp_path / "adapter", tmp_path / "out", type="F16", tokens=128)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("file_type", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_what_is_right_is_far_within_the_bound(spoken: Path, file_type: str, tmp_path: Path) -> None:
    result = export(spoken, tmp_path / "out", type=file_type, tokens=256)
    assert result.proof is not None
    assert result.proof.kl <= result.proof.bound / 4
    assert result.proof.bound < result.drift[-1].kl + 2e-6  # a part of what the type itself drifts, and arithmetic
