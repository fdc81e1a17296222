"""Quantised weights of which each process loads its own rows: the bytes are those of whole weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model_folders import save_model
from tests.parallel.forked import run_in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.distributed.sharding_utils import DtensorShardOperation

from longfit.layers.linear8bit import Linear8bit
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.load import load, load_report
from longfit.model.own_rows import OwnRows

PROCESSES = 3
"""Which divides no number of rows of the model: 64, 32 and 96 come in parts of 22, 11 and 32."""

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4, constants in float32": {"quant": "fp4", "double_quant": False},
    "blocks of 32": {"block_size": 32},
    "int8": {"quant": "int8"},
    "two kinds": {"int8_modules": ["model.layers.0.mlp.up_proj"]},
}


def layers_of(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def load_rows(rank: int, folder: str) -> list[str]:
    """Compare with a model that is loaded whole; returns what is wrong."""
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("shard",))
    ids = torch.arange(12)[None]
    problems: list[str] = []
    for title, settings in FORMATS.items():
        read: list[int] = []
        original = DtensorShardOperation.shard_tensor

        def counted(self: Any, *args: Any, _original: Any = original, _read: list[int] = read, **kwargs: Any) -> Any:
            part = _original(self, *args, **kwargs)
            _read.append(part.numel())
            return part

        DtensorShardOperation.shard_tensor = counted
        own = OwnRows(mesh)
        model, _ = load(folder, device="cpu", **settings, own_rows=own)
        DtensorShardOperation.shard_tensor = original
        whole, _ = load(folder, device="cpu", **settings)
        cut = 0
        for (name, layer), expected in zip(layers_of(model).items(), layers_of(whole).values(), strict=True):
            first = -(-layer.out_features // PROCESSES) * rank
            cut += len(layer.weight) < layer.out_features
            same = torch.equal(layer.weight, expected.weight[first : first + len(layer.weight)])
            if not same or not torch.equal(layer.constants, expected.constants):
                problems.append(f"{title}: {name} has other bytes")
            if isinstance(layer, Linear8bit) != isinstance(expected, Linear8bit):
                problems.append(f"{title}: {name} is of another kind")
        dense = sum(layer.in_features * layer.out_features for layer in layers_of(whole).values())
        if cut and sum(read) > 0.36 * dense:  # 22 of 64 rows, 11 of 32, 32 of 96
            problems.append(f"{title}: read {sum(read)} of {dense} weights")
        kept, all_of_it = load_report(model), load_report(whole)
        if (
            kept.quantized_bytes > 0.37 * all_of_it.quantized_bytes
            or kept.bits_per_param > 1.1 * all_of_it.bits_per_param
        ):
            problems.append(f"{title}: keeps {kept.quantized_bytes} bytes, {kept.bits_per_param} bits a parameter")
        with torch.no_grad():
            if not torch.equal(model(ids).logits, whole(ids).logits):
                problems.append(f"{title}: a gathered layer computes something else")
        still = sum(len(layer.weight) < layer.out_features for layer in layers_of(model).values())
        if not cut == still == len(layers_of(model)):
            problems.append(f"{title}: some layer is whole")
        own.release()
        if not all(isinstance(layer.weight, DTensor) for layer in layers_of(model).values()):
            problems.append(f"{title}: released rows are no DTensors")
    return problems


def test_own_rows_are_those_of_a_whole_weight(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "base", attention_bias=True, intermediate_size=128))
    for problems in run_in_processes(load_rows, PROCESSES, folder):
        assert problems == []


def load_packed(rank: int, folder: str) -> bool:
    own = OwnRows(init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)))
    model, _ = load(folder, device="cpu", own_rows=own)
    whole, _ = load(folder, device="cpu")
    pairs = zip(layers_of(model).values(), layers_of(whole).values(), strict=True)
    return all(torch.equal(own.cut(b.weight.data), a.weight) for a, b in pairs)


def test_a_checkpoint_that_is_quantised_already_is_cut(tmp_path: Path) -> None:
    model, tokenizer = load(save_model(tmp_path / "base", intermediate_size=128), device="cpu")
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    assert run_in_processes(load_packed, 2, str(tmp_path / "packed")) == [True, True]


def load_crossing(rank: int, folder: str) -> bool:
    own = OwnRows(init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)))
    model, _ = load(folder, device="cpu", own_rows=own)
    whole, _ = load(folder, device="cpu")
    down = "model.layers.0.mlp.down_proj"
    return torch.equal(layers_of(model)[down].weight, layers_of(whole)[down].weight)


def test_a_weight_whose_blocks_cross_its_rows_stays_whole(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "base", intermediate_size=96))  # 96 is no multiple of 64
    assert run_in_processes(load_crossing, 2, folder) == [True, True]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
