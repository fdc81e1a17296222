"""A model that computes in another dtype has the weights that it was loaded with."""

from pathlib import Path

import pytest
import torch
from tests.exporting.conftest import make_run  # noqa: F401
from tests.model_folders import save_model

from longfit.model.compute_dtype import compute_in
from longfit.model.load import load
from longfit.training import prepare
from longfit.training.prepare import open_run

NAME = "model.layers.1.mlp.up_proj"
IDS = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(2))


def test_bytes_stay_and_what_is_dense_is_cast(tmp_path: Path) -> None:
    save_model(tmp_path / "base", dtype=torch.float32)
    model, _ = load(tmp_path / "base", dtype=torch.bfloat16)
    codes, embeddings = model.get_submodule(NAME).weight.clone(), model.get_input_embeddings().weight.float()
    compute_in(model, torch.float32)
    assert torch.equal(model.get_submodule(NAME).weight, codes)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert model(input_ids=IDS).logits.dtype == torch.float32
    other, _ = load(tmp_path / "base", dtype=torch.float32)  # why loading it in float32 would not do
    assert not torch.equal(other.get_submodule(NAME).weight, codes)


def test_a_run_is_read_where_bfloat16_is_slow(make_run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """On a processor without bf16 instructions it computes in float32, with the weights of the run all the same."""
    run = make_run(**{"model.dtype": "bfloat16", "train.steps": 1})
    expected, _, _ = open_run(run, device=torch.device("cpu"))
    monkeypatch.setattr(prepare.processor, "auto_dtype", lambda *device: ("float32", "no bf16 instructions"))
    found, _, _ = open_run(run, device=torch.device("cpu"))
    with torch.no_grad():
        assert found(input_ids=IDS).logits.dtype == torch.float32
    name = f"base_model.model.{NAME}.base_layer.weight"
    assert torch.equal(found.get_parameter(name), expected.get_parameter(name))
