"""Bases that are quantised already: the model that a dense checkpoint of the same values makes, to the last byte."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model_folders import byte_tokenizer, llama
from tests.moe_models import mixture
from tests.stored_folders import FORMATS, save_stored

from longfit.errors import ModelError
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model import stored_weights
from longfit.model.load import load, load_report
from longfit.model.pack_experts import packed_parameters

LINEAR = [kind for kind in FORMATS if kind != "mxfp4"]
IDS = torch.arange(1, 12)[None]


def saved(folder: Path, kind: str, **options) -> Path:
    """A Llama of one head size that all formats take, with short last blocks of FP8: 160 = 128 + 32."""
    if kind == "mxfp4":
        model = mixture("gpt_oss", hidden_size=64, intermediate_size=32)
    else:
        model = llama(intermediate_size=160, dtype=torch.float32, **options)
    save_stored(folder, model, kind)
    for name in ("dense", "stored"):
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("kind", list(FORMATS))
def test_the_dense_model_is_that_of_the_values(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path, kind)
    models = [load(folder / name, quant="none", dtype=torch.float32)[0] for name in ("stored", "dense")]
    for (name, mine), (_, theirs) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(mine, theirs), name
    assert getattr(models[0].config, "quantization_config", None) is None
    report = load_report(models[0])
    assert report.added_error is None
    assert re.search(rf"^de-quantised: \d+ weights of {WORDS[kind]}$", str(report), flags=re.MULTILINE)


WORDS = {
    "fp8": "FP8 in blocks of 128 x 128",
    "gptq": "GPTQ, 4 bits, groups of 32",
    "awq": "AWQ, 4 bits, groups of 32",
    "compressed-tensors": "compressed-tensors, integers of 4 bits, groups of 32",
    "mxfp4": "MXFP4, blocks of 32",
}


@pytest.mark.parametrize("kind", list(FORMATS))
def test_quantised_again_it_is_what_the_values_make(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path, kind)
    mine, theirs = (load(folder / name, dtype=torch.bfloat16)[0] for name in ("stored", "dense"))
    layers = [name for name, module in mine.named_modules() if isinstance(module, QuantizedLinear)]
    for name in layers:
        assert torch.equal(mine.get_submodule(name).weight, theirs.get_submodule(name).weight), name
    for (name, *_, rows), (_, *_, others) in zip(packed_parameters(mine), packed_parameters(theirs), strict=True):
        assert torch.equal(rows, others), name
    assert torch.equal(mine(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    report = load_report(mine)
    assert len(layers) > 4
    assert report.added_error is not None
    # NF4 of weights near normal, or of 16 levels: half a level of 16 at most, about a tenth in the mean.
    assert 0.01 < report.added_error < 0.2
    assert "error that this adds" in str(report)
    assert mine.config.name_or_path == str(folder / "stored")


def test_the_added_error_is_that_of_all_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path, "gptq")
    model = load(folder / "stored", dtype=torch.float32)[0]
    dense = load(folder / "dense", quant="none", dtype=torch.float32)[0]
    errors = squares = 0.0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = dense.get_submodule(name).weight.detach().double()
            errors += float((module.dequantize(torch.float32).double() - weight).square().sum())
            squares += float(weight.square().sum())
    # Sums of some 1e5 float32 squares in another order.
    assert load_report(model).added_error == pytest.approx((errors / squares) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("kind", ["fp8", "gptq"])
def test_experts_of_a_checkpoint_are_stacked_from_their_parts(tmp_path: Path, kind: str) -> None:
    save_stored(
        tmp_path,
        mixture("qwen3_moe", hidden_size=64, head_dim=16, intermediate_size=64, moe_intermediate_size=32),
        kind,
    )
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    assert any("experts.0.gate_proj" in key for key in stored)
    models = []
    for name in ("stored", "dense"):
        byte_tokenizer().save_pretrained(tmp_path / name)
        models.append(load(tmp_path / name, dtype=torch.bfloat16)[0])
    found = [list(packed_parameters(model)) for model in models]
    assert found[0]
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine[3], theirs[3]), mine[0]


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    folder = saved(tmp_path, "fp8", tied=True)
    model, _ = load(folder / "stored")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rows_are_dequantised_a_slice_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in LINEAR:
        folder = saved(tmp_path / kind, kind)
        whole = load(folder / "stored", quant="none", dtype=torch.float32)[0].state_dict()
        with monkeypatch.context() as patch:
            patch.setattr(stored_weights, "SLICE_ELEMENTS", 1)
            sliced = load(folder / "stored", quant="none", dtype=torch.float32)[0].state_dict()
        assert all(torch.equal(sliced[name], whole[name]) for name in whole), kind


def test_biases_of_zeros_that_the_model_has_no_place_for_are_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path, "gptq") / "stored"
    tensors = load_file(folder / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {bias: torch.zeros(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder)
    save_file(tensors | {bias: torch.ones(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the checkpoint has .*q_proj\.bias"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", ("drop", "model.layers.0.mlp.up_proj.weight_scale_inv"), "up_proj.weight holds F8_E4M3"),
        ("gptq", ("drop", "model.layers.0.mlp.up_proj.qzeros"), "up_proj.qweight is there, .*up_proj.qzeros is not"),
        ("gptq", ("drop", "model.layers.0.mlp.up_proj.qweight"), "up_proj.g_idx holds I32"),
        ("awq", ("cut", "model.layers.0.mlp.up_proj.scales"), "parts of .*up_proj.weight do not fit"),
        ("awq", ("cut", "model.layers.0.mlp.up_proj.qweight"), r"up_proj.weight has shape \[160, 32\], config.json"),
        ("compressed-tensors", ("cut", "model.layers.0.mlp.up_proj.weight_packed"), "parts of .*up_proj.weight do not"),
        ("mxfp4", ("drop", "model.layers.0.mlp.experts.down_proj_scales"), "down_proj_blocks is there, .* is not"),
    ],
)
def test_parts_that_are_missing_or_damaged_are_named(tmp_path: Path, kind: str, change, message: str) -> None:
    folder = saved(tmp_path, kind) / "stored"
    tensors = load_file(folder / "model.safetensors")
    how, name = change
    if how == "drop":
        del tensors[name]
    else:
        tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "gptq") / "stored"
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors files"):
        load(folder)


def test_activations_that_the_source_rounds_are_said(tmp_path: Path) -> None:
    folder = saved(tmp_path, "compressed-tensors") / "stored"
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    path.write_text(json.dumps(config))
    assert "activations, which its kernels round too, are not rounded" in str(load_report(load(folder)[0]))
