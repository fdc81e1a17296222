"""Sharded weights (FSDP2) under the sweep against one process: losses, gradients, bytes; with shared windows too."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.exact_norms import exact_norms
from tests.parallel.forked import run_in_processes
from tests.parallel.test_sequence import TOLERANCE, batch_of
from tests.tiny_models import tiny_model
from torch import nn

from longfit.attention.hf_attention import attention_key
from longfit.engine.loss.training_loss import TrainingLoss, shifted_labels, training_loss
from longfit.engine.sweep.install import enable_sweep
from longfit.layers.experts import constants_of
from longfit.layers.linear4bit import Linear4bit
from longfit.model.adapters import register_layers
from longfit.model.pack_experts import compute_packed, pack, packable_experts, packed_parameters, store
from longfit.numerics.row_format import RowFormat
from longfit.parallel.device_layout import DeviceLayout
from longfit.parallel.sequence import SequenceParallelLoss
from longfit.parallel.shard import Shards, decoder_layers, mesh_of, shard_model, whole_tensor

STEPS = 5


def model_of(family: str) -> Any:
    """A 4-bit base with adapters, norms and embeddings that train, all in float64."""
    model: Any = tiny_model(family, num_heads=8, num_kv_heads=4, intermediate_size=96)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, Linear4bit.from_linear(module.float(), block_size=32))
    experts = pack_all(model)
    model.set_attn_implementation(attention_key("shifted", 16))
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"] if experts else "all-linear",
        target_parameters=experts,
        modules_to_save=["input_layernorm", "embed_tokens"],
    )
    register_layers(config, model)
    torch.manual_seed(0)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter, dtype=torch.float64)
    exact_norms(model)
    enable_sweep(model, tile=8)
    return model.train()


def pack_all(model: Any) -> list[str] | None:
    """Quantise stacked experts in place; their names for PEFT, if there are any."""

    def stored_as(linear: nn.Linear) -> Linear4bit:
        form = RowFormat(linear.out_features, linear.in_features, block_size=32)
        return Linear4bit.placeholder(form, bias=False, bias_dtype=torch.float64, device="meta")

    for path, module, names in list(packable_experts(model, {})):
        dense = {name: getattr(module, name).detach() for name in names}
        pack(module, names, stored_as)
        for name, weight in dense.items():
            rows, constants = store(module, f"{path}.{name}", weight).values()
            module.register_parameter(name, rows)
            module.packed.register_buffer(constants_of(name), constants)
    compute_packed(model)
    return [f"experts.{name}" for _, _, name, _ in packed_parameters(model)][:2] or None


def steps(model: Any, loss_module: nn.Module, parts: int, rank: int | None, collect: Any, local: Any) -> list[Any]:
    """Losses of some steps on two windows each, and the last gradients; with a rank, of one of them."""
    told: list[Any] = []
    for step in range(STEPS):
        batches = [batch_of(2 * step + window, (50, 14), 1) for window in range(2)]
        count = sum(
            int((shifted_labels(b["input_ids"], b["labels"], b["position_ids"], None) != -100).sum()) for b in batches
        )
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches if rank is None else batches[rank : rank + 1]:
            loss = loss_module(**batch, num_items=count)
            (loss * parts).backward()
            total += loss.detach()
        collect()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        told = [*told, total, *((whole_tensor(p.grad).clone() for p in trained) if step == STEPS - 1 else ())]
        with torch.no_grad():
            for parameter in trained:
                place = local(parameter)
                if place.grad is not None:
                    place -= 0.1 * place.grad
                parameter.grad = place.grad = None
    return told


def together(rank: int, family: str, sequence: bool) -> list[Any]:
    model = model_of(family)
    loss: Any = training_loss
    layout = DeviceLayout(2, 2 if sequence else 1, 2)
    if sequence:
        loss = SequenceParallelLoss(torch.distributed.group.WORLD, balanced=False)
    module = TrainingLoss(model, loss=loss)
    whole = sum(p.nbytes for p in model.parameters())
    shard_model(module, decoder_layers(model), mesh_of(layout, torch.device("cpu")))
    shards = Shards([p for p in model.parameters() if p.requires_grad], num_devices=2)
    held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
    assert held <= 0.52 * whole
    told = steps(model, module, 2, None if sequence else rank, shards.collect_gradients, shards.local)
    for number in (number for number in told if number.dim() == 0):
        torch.distributed.all_reduce(number)
    return told


@pytest.mark.parametrize(
    ("family", "sequence"),
    [("llama", False), ("llama", True), ("gemma3", False), ("gemma3", True), ("mixtral", True)],
    ids=lambda value: {False: "windows", True: "one window"}.get(value, value),
)
def test_sharded_weights_learn_what_whole_ones_learn(family: str, sequence: bool) -> None:
    model = model_of(family)
    alone = steps(model, TrainingLoss(model), 1, None, lambda: None, lambda p: p)
    for told in run_in_processes(together, 2, family, sequence):
        assert len(told) == len(alone)
        for expected, found in zip(alone, told, strict=True):
            scale = expected.abs().max().clamp_min(1e-3)
            assert float((found - expected).abs().max() / scale) < TOLERANCE
