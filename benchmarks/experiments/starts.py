"""Experiment 6: what closes the gap between a 4-bit base and 16-bit LoRA? Starts, block sizes, 8 bits, a mixed base.

The same adapters, windows and learning rates in every row; only the frozen base, and where the adapter begins, differ:

    16 bits             LoRA on the dense base: what all others are compared with
    NF4                 blocks of 64, double quantisation: the default
    NF4, LoftQ          the adapter begins with the low-rank part of the rounding error
    NF4, PiSSA          the adapter begins with the principal part of the weight, and the rest is rounded
    NF4, blocks of 32   4.25 bits instead of 4.13
    INT8                one constant a row
    mixed               NF4, and 8 bits for the layers that lose most, a quarter of the way in bytes from NF4 to INT8

Validation loss on held-out documents before, on the way and after, three seeds. A row takes hours on two cores.

    python -m benchmarks.experiments.starts            benchmarks/results/experiments/starts.json, the table on screen
    python -m benchmarks.experiments.starts --quick    a few steps on short windows: a smoke test, starts_quick.json
    python -m benchmarks.experiments.starts --draw     the table of what was measured

It may be interrupted at any time: finished cells stay.
"""

import argparse
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import torch
from benchmarks.experiments.cells import RESULTS, Cells, Settings
from benchmarks.experiments.pages import rows
from benchmarks.experiments.texts import held_out_documents, held_out_losses, reference, training_windows
from benchmarks.experiments.training import Recipe, train
from torch import Tensor, nn

from longfit.demo import demo_model
from longfit.engine.hf_model import base_model
from longfit.engine.sweep.install import enable_sweep
from longfit.evaluation.quant_error import quantizable_layers
from longfit.evaluation.quant_plan import quant_plan
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.linear8bit import Linear8bit
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.adapters import add_adapters
from longfit.model.load import load
from longfit.numerics.low_rank import loftq, pissa
from longfit.numerics.quant_state import dequantize_4bit, quantize_4bit

DOCUMENTS = ("tarfile", "doctest", "argparse", "turtle")
RANK, ALPHA = 16, 32.0
BASES = ("16 bits", "NF4", "NF4, LoftQ", "NF4, PiSSA", "NF4, blocks of 32", "INT8", "mixed")
MIXED_SHARE = 1 / 4

Start = tuple[Tensor, Tensor]
"""A ``[R, I]`` and B ``[O, R]`` that an adapter begins with, scaling not yet taken out."""


def cells(*, window: int, steps: int, seeds: int) -> Iterator[Settings]:
    """The most telling first."""
    for seed in range(seeds):
        for base in BASES:
            yield {"base": base, "seed": seed, "window": window, "steps": steps}


def measure(settings: Settings) -> dict[str, Any]:
    """Train one row."""
    window, steps, seed = settings["window"], settings["steps"], settings["seed"]
    model, tokenizer = load(demo_model(), quant="none", device="cpu")
    starts = store(model, settings["base"], text=reference(tokenizer)[:2048])
    stored = stored_bytes(model)
    torch.manual_seed(seed)
    model = begin(add_adapters(model, rank=RANK, alpha=ALPHA), starts)
    enable_sweep(model)
    held_out = held_out_documents(tokenizer, DOCUMENTS, tokens=window)
    losses: dict[str, dict[str, float]] = {}

    def look(step: int) -> None:
        if step in (0, steps // 2, steps):
            losses[str(step)] = held_out_losses(model, held_out)

    look(0)
    windows = training_windows(tokenizer, window=window, number=steps, seed=seed)
    record = train(model.train(), windows, Recipe(seed=seed), after_step=look)
    return {**record, "held_out": losses, "stored_bytes": stored}


def store(model: nn.Module, base: str, *, text: Tensor) -> dict[str, Start]:
    """Replace the linear layers of a dense model by those of a row.

    Args:
        text: tokens ``[T]`` that the mixed base is planned on.
    Returns: what adapters begin with, by layer; nothing where they begin as plain LoRA.
    """
    names = {id(module): name for name, module in base_model(model).named_modules()}
    layers = {names[id(layer)]: layer for layer in quantizable_layers(model)}
    eight = set(mixed(model, text)) if base == "mixed" else set(layers) if base == "INT8" else set()
    starts: dict[str, Start] = {}
    for name, layer in layers.items():
        if base == "16 bits":
            continue
        replacement: QuantizedLinear
        if name in eight:
            replacement = Linear8bit.from_linear(layer)
        else:
            target = layer.weight.detach()
            if base == "NF4, LoftQ":
                A, B, target = loftq(target, nf4, rank=RANK)
                starts[name] = A, B
            elif base == "NF4, PiSSA":
                A, B, target = pissa(target, rank=RANK)
                starts[name] = A, B
            replacement = four_bits(layer, target, block_size=32 if base == "NF4, blocks of 32" else 64)
        base_model(model).set_submodule(name, replacement)
    return starts


def nf4(matrix: Tensor) -> Tensor:
    """Round to NF4 as the base is stored."""
    return dequantize_4bit(*quantize_4bit(matrix), dtype=torch.float32)


def four_bits(layer: nn.Linear, weight: Tensor, *, block_size: int) -> Linear4bit:
    """A layer that holds another weight than its own, in NF4; it computes in the dtype of the layer."""
    packed, state = quantize_4bit(weight.to(layer.weight.dtype), block_size=block_size)
    return Linear4bit.from_packed(packed, state, bias=layer.bias)


def mixed(model: nn.Module, text: Tensor) -> tuple[str, ...]:
    """The layers that get 8 bits."""
    everything = quant_plan(model, text, budget_bytes=1 << 60)
    low = sum(layer.low_bytes for layer in everything.layers)
    budget = low + round(MIXED_SHARE * (everything.nbytes - low))
    return quant_plan(model, text, budget_bytes=budget).int8_modules


def begin(model: Any, starts: dict[str, Start]) -> Any:
    """Let adapters begin with these parts; their scaling is taken out of both factors alike."""
    for name, (A, B) in starts.items():
        layer = base_model(model).get_submodule(name)
        root = layer.scaling["default"] ** 0.5
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(A / root)
            layer.lora_B["default"].weight.copy_(B / root)
    return model


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    return sum(tensor.nbytes for tensor in tensors.values())


def held_out_mean(result: dict[str, Any], step: int) -> float:
    """Validation loss, the mean over documents."""
    return mean(result["held_out"][str(step)].values())


def spread(values: list[float]) -> str:
    """Mean of the seeds, and their standard deviation."""
    return f"{mean(values):.3f}" + (f" +- {stdev(values):.3f}" if len(values) > 1 else "")


def table(found: Cells) -> str:
    """Every base: its bytes, validation loss at both ends, and what it lacks to 16 bits, seed by seed."""
    body = []
    for base in BASES:
        records = found.select(base=base)
        if not records:
            continue
        ends = [held_out_mean(record["result"], record["settings"]["steps"]) for record in records]
        twins = [found.find({**record["settings"], "base": "16 bits"}) for record in records]
        gaps = [
            end - held_out_mean(twin, record["settings"]["steps"])
            for end, twin, record in zip(ends, twins, records, strict=True)
            if twin is not None
        ]
        begins = spread([held_out_mean(record["result"], 0) for record in records])
        megabytes = f"{records[0]['result']['stored_bytes'] / 1e6:.0f} MB"
        body.append([base, megabytes, begins, spread(ends), spread(gaps) if gaps else "-", str(len(records))])
    return rows(["base", "weights", "loss before", "loss after", "above 16 bits", "seeds"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on short windows: a smoke test")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    found = Cells(RESULTS / f"starts{'_quick' * arguments.quick}.json")
    size = {"window": 128, "steps": 4, "seeds": 1} if arguments.quick else {"window": 512, "steps": 200, "seeds": 3}
    if not arguments.draw:
        found.run(cells(**size), measure)
    print(table(found))


if __name__ == "__main__":
    main()
