"""What the GPU benchmark runs on: sizes, clocks, a Llama of any depth with random 4-bit weights, a training step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_report import Report
from longfit.attention.hf_attention import attention_key
from longfit.engine.hf_model import base_model
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.offload.activations import ActivationOffload, DeviceActivations
from longfit.engine.offload.pinned_activations import PinnedActivations
from longfit.engine.sweep.install import enable_sweep
from longfit.layers.linear4bit import Linear4bit
from longfit.model.adapters import add_adapters
from longfit.model.load import auto_dtype

GROUP = 8192
RANK = 32


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    copy_bytes: int
    gemm: int
    weight: tuple[int, int]
    tokens: int  # of the layer benchmark
    attention: tuple[int, int]  # tokens of a tile, keys
    contexts: tuple[int, ...]  # of the full model
    plain_contexts: tuple[int, ...]
    slope_contexts: tuple[int, ...]  # of two layers
    offload_context: int
    cards_gib: tuple[int, ...]
    group: int
    repeats: int
    config: dict[str, int]


REAL = Sizes(
    copy_bytes=1 << 30, gemm=8192, weight=(14336, 4096), tokens=8192, attention=(2048, 65536),
    contexts=(8192, 32768, 131072), plain_contexts=(8192, 32768), slope_contexts=(65536, 262144, 1048576),
    offload_context=65536, cards_gib=(8, 12, 16, 24, 40, 48, 80, 141), group=GROUP, repeats=20,
    config={
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    },
)  # fmt: skip
TINY = Sizes(
    copy_bytes=1 << 16, gemm=64, weight=(96, 64), tokens=32, attention=(32, 64), contexts=(64, 128),
    plain_contexts=(64,), slope_contexts=(128, 256), offload_context=128, cards_gib=(8,), group=32, repeats=2,
    config={
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
)  # fmt: skip


class Bench:
    """The device, the sizes, the report, and how time and memory are taken on this device."""

    def __init__(self, device: torch.device, sizes: Sizes, report: Report) -> None:
        self.device, self.sizes, self.report = device, sizes, report
        self.dtype = auto_dtype(device)[0]
        self.cuda = device.type == "cuda"
        self.gemm_flops = 1e11  # measured by `ceilings`
        self.copy_bandwidth = 1e9

    def seconds(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Median seconds of a call, after one that does not count; on a card between two events."""
        run()
        times = []
        for _ in range(repeats or self.sizes.repeats):
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]

    def seconds_in_a_graph(self, run: Callable[[], object], copies: int = 20) -> float:
        """Seconds of a call too short for the processor to keep up with: captured some times in a CUDA graph."""
        if not self.cuda:
            return self.seconds(run)
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(copies):
                run()
        return self.seconds(graph.replay) / copies

    def once(self, run: Callable[[], object]) -> tuple[float, int]:
        """Seconds of one call, and the most bytes allocated meanwhile (0 on a CPU)."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        run()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() if self.cuda else 0

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def offload(self) -> ActivationOffload:
        """Where layer inputs wait: in host memory."""
        return PinnedActivations(self.device) if self.cuda else DeviceActivations(copy=True)

    def reserve(self, offload: ActivationOffload, tile: int, tokens: int, layers: int) -> None:
        """Pin the memory of a step before it is timed: a run does that once, in its first step."""
        if isinstance(offload, PinnedActivations):
            num_bytes = tile * self.sizes.config["hidden_size"] * self.dtype.itemsize
            slabs = [offload.take(num_bytes) for _ in range(layers * -(-tokens // tile))]
            for slab in slabs:
                offload.give(slab)


# ------------------------------------------------------------------------------------------------ the model
def model_of(
    bench: Bench, *, layers: int, config: dict[str, int] | None = None, dtype: torch.dtype | None = None,
    rank: int = RANK,
) -> Any:  # fmt: skip
    """A Llama with random NF4 weights and adapters, made on the device layer by layer, swept, in training mode."""
    values = {**(config or bench.sizes.config), "num_hidden_layers": layers}
    dtype = dtype or bench.dtype
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**values, use_cache=False)).to(dtype)
    weights: dict[tuple[int, int], Linear4bit] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            shape = (module.out_features, module.in_features)
            if shape not in weights:  # quantised once per shape; every layer gets a copy
                dense = nn.Linear(shape[1], shape[0], bias=False, device=bench.device, dtype=dtype)
                nn.init.normal_(dense.weight, std=0.02)
                weights[shape] = Linear4bit.from_linear(dense)
            made = weights[shape]
            parent = model.get_submodule(name.rpartition(".")[0])
            copied = Linear4bit(made.row_format, made.weight.data.clone(), made.constants.clone())
            setattr(parent, name.rpartition(".")[2], copied)
    for parameter_name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = parameter_name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=dtype, device=bench.device)
            value = nn.init.ones_(value) if "norm" in owner else nn.init.normal_(value, std=0.02)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(bench.device)
    return add_adapters(model.requires_grad_(False), rank=rank, alpha=2 * rank).train()


def step(model: Any, ids: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One training step."""
    training_loss(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def sweep(bench: Bench, model: Any, attention: str, offload: ActivationOffload, *, tile: int | None = None) -> int:
    """Choose attention and offload; returns the tile."""
    key = attention_key(attention, bench.sizes.group if attention == "shifted" else None)
    base_model(model).set_attn_implementation(key)
    return enable_sweep(model, tile=tile, offload=offload).tile


def step_flops(config: dict[str, int], tokens: int, *, layers: int, group: int | None = None) -> float:
    """Operations of one step: forward, forward again, gradients of inputs; attention's backward counts 2.5 forwards."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    linear = hidden * (2 * hidden + 2 * kv + 3 * inner)
    seen = min(tokens, group or tokens) / 2  # keys of the average query
    return layers * tokens * (6 * linear + 4.5 * 4 * seen * hidden) + 6 * tokens * hidden * config["vocab_size"]
