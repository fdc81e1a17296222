"""Experiment 1: what each data type costs a model (QLoRA, section 4, table 2 and figure 3).

The linear layers of SmolLM2-135M are rounded to INT8, INT4, FP4, NF4 and to levels estimated from each weight, with
and without double quantisation, in several block sizes: bits per parameter, error of the weights, perplexity of five
documents, one by one, so that a difference between two types has a spread.

The model comes from a GGUF file whose weights are Q4_1: in blocks of 32, each weight stands on one of 16 equally
spaced levels. Equally spaced types would profit from that. So everything is measured twice:

    as loaded    the weights of the file
    dithered     each weight moved by an even random number within its step, so that it no longer stands on a level;
                 their own unquantised perplexity is the one to compare with
    normal       normal random weights, where NF4 is at home: error of the weights only

    python -m benchmarks.experiments.data_types            benchmarks/results/experiments/data_types.json, figure, page
    python -m benchmarks.experiments.data_types --quick    three cells on little text: a smoke test, data_types_quick.*
"""

import argparse
import math
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import torch
from benchmarks.experiments.cells import RESULTS, Cells, Settings, describe
from benchmarks.experiments.figures import panels
from benchmarks.experiments.pages import rows, write
from benchmarks.experiments.texts import held_out_documents, held_out_losses, reference
from torch import nn

from longfit.demo import demo_model
from longfit.evaluation.quant_error import DataType, quantizable_layers, quantized_weights, round_to
from longfit.model.load import load

TOKENS = 1024  # of each document
SOURCES = ("tarfile", "doctest", "argparse", "turtle")
DOCUMENTS = ("reference", *SOURCES)
Q4_1_BLOCK, Q4_1_STEPS = 32, 15
NAMES = ("nf4", "fp4", "int4", "quantile", "int8")
FOUR_BITS = ("nf4", "fp4", "int4")
OTHER_BLOCK_SIZES = (32, 128, 256)
BLOCK_KINDS = (("nf4", True), ("nf4", False), ("fp4", False), ("int4", False))
COLOURS = {"nf4": "C0", "fp4": "C1", "int4": "C2", "quantile": "C4", "int8": "C3"}
SEEDS = (0, 1, 2)  # each dithers to another model of the same quality: the spread of one rounding


def cells(tokens: int) -> Iterator[Settings]:
    """The table, the most telling rows first."""
    for weights in ("dithered", "as loaded"):
        yield _cell(weights, "none", 0, False, tokens)
        for name in NAMES:
            for double_quant in (True, False):
                yield _cell(weights, name, 64, double_quant, tokens)
    for name in NAMES:
        for double_quant in (True, False):
            yield _cell("normal", name, 64, double_quant, 0)
    for seed in SEEDS[1:]:
        yield _cell("dithered", "none", 0, False, tokens, seed)
        for name in FOUR_BITS:
            yield _cell("dithered", name, 64, True, tokens, seed)
    for block_size in OTHER_BLOCK_SIZES:
        for name, double_quant in BLOCK_KINDS:
            yield _cell("dithered", name, block_size, double_quant, tokens)
        yield _cell("normal", "nf4", block_size, True, 0)
    for seed in SEEDS[1:]:
        yield _cell("dithered", "nf4", 32, True, tokens, seed)


def quick_cells() -> Iterator[Settings]:
    yield _cell("dithered", "none", 0, False, 256)
    yield _cell("dithered", "nf4", 64, True, 256)
    yield _cell("normal", "nf4", 64, True, 0)


def _cell(weights: str, name: str, block_size: int, double_quant: bool, tokens: int, seed: int = 0) -> Settings:
    return {
        "weights": weights,
        "data_type": name,
        "block_size": block_size,
        "double_quant": double_quant,
        "tokens": tokens,
        "seed": seed,
    }


class Bench:
    """The model, dithered when the first cell asks for it, and the text; loaded when the first cell is measured."""

    def __init__(self) -> None:
        self.loaded: tuple[tuple[str, int], Any, Any] | None = None

    def model(self, weights: str, seed: int) -> tuple[Any, Any]:
        """The model with these weights, and its tokenizer."""
        if self.loaded is None or self.loaded[0] != (weights, seed):
            model, tokenizer = load(demo_model(), quant="none", device="cpu")
            if weights == "dithered":
                dither(model, seed=seed)
            self.loaded = (weights, seed), model, tokenizer
        return self.loaded[1:]

    def measure(self, settings: Settings) -> dict[str, Any]:
        name = settings["data_type"]
        data_type = None if name == "none" else DataType(name, settings["block_size"], settings["double_quant"])
        if settings["weights"] == "normal":
            assert data_type is not None
            return normal_error(data_type)
        model, tokenizer = self.model(settings["weights"], settings["seed"])
        tokens = settings["tokens"]
        documents = {
            "reference": reference(tokenizer)[:tokens],
            **held_out_documents(tokenizer, SOURCES, tokens=tokens),
        }
        with quantized_weights(model, data_type) as cost:
            found = held_out_losses(model, documents)
        average = mean(found.values())
        return {
            "bits_per_param": cost.bits_per_param,
            "relative_error": cost.relative_error,
            "mean_abs_error": cost.mean_abs_error,
            "nll": average,
            "perplexity": math.exp(average),
            "nll_by_document": found,
        }


@torch.no_grad()
def dither(model: nn.Module, *, seed: int) -> None:
    """Move every quantisable weight by an even random number within half a step of its Q4_1 block to either side."""
    draw = torch.Generator().manual_seed(seed)
    for layer in quantizable_layers(model):
        blocks = layer.weight.detach().float().view(-1, Q4_1_BLOCK)
        step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / Q4_1_STEPS
        moved = blocks + step * (torch.rand(blocks.shape, generator=draw) - 0.5)
        layer.weight.copy_(moved.view_as(layer.weight))


def normal_error(data_type: DataType) -> dict[str, Any]:
    """Bits and errors of a million standard normal weights."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    rounded, nbytes = round_to(weight, data_type)
    error = rounded - weight
    return {
        "bits_per_param": 8 * nbytes / weight.numel(),
        "relative_error": float(error.norm() / weight.norm()),
        "mean_abs_error": float(error.abs().mean()),
    }


def label(settings: Settings) -> str:
    return settings["data_type"].upper() + (" + DQ" if settings["double_quant"] else "")


def added(found: Cells, settings: Settings) -> dict[str, float]:
    """Loss added by a data type to the same weights in 16 bits, document by document."""
    base = _result(found, _cell(settings["weights"], "none", 0, False, settings["tokens"], settings["seed"]))
    result = _result(found, settings)
    return {name: result["nll_by_document"][name] - base["nll_by_document"][name] for name in DOCUMENTS}


def draw(found: Cells) -> None:
    """Damage over the error of the weights; each document of each dithered model; damage over bits."""
    with panels("data-types.png", 3) as (left, middle, right):
        draw_errors(found, left)
        draw_documents(found, middle)
        draw_bits(found, right)


def draw_errors(found: Cells, axes: Any) -> None:
    for name in NAMES:
        for weights, marker in (("as loaded", "s"), ("dithered", "o")):
            chosen = found.select(data_type=name, weights=weights, block_size=64)
            errors = [row["result"]["relative_error"] for row in chosen]
            losses = [mean(added(found, row["settings"]).values()) for row in chosen]
            axes.plot(errors, losses, marker, color=COLOURS[name], alpha=0.6, label=f"{name.upper()}, {weights}")
    axes.set(xlabel="relative error of the weights", ylabel="loss added (nats a token)", title="error and damage")
    axes.legend(fontsize=8)


def draw_documents(found: Cells, axes: Any) -> None:
    order = ("quantile", "fp4", "int4", "nf4", "int8")
    for row in found.select(weights="dithered", block_size=64, double_quant=True):
        name, seed = row["settings"]["data_type"], row["settings"]["seed"]
        values = list(added(found, row["settings"]).values())
        place = order.index(name) - 0.2 * seed + 0.2
        axes.plot(values, [place] * len(values), "o", color=COLOURS[name], alpha=0.35)
        axes.plot(mean(values), place, "|", color=COLOURS[name], markersize=10, markeredgewidth=3)
    axes.set_yticks(range(len(order)), [f"{name.upper()} + DQ" for name in order])
    axes.axvline(0, color="grey", linestyle=":")
    axes.set(xlabel="loss added (nats a token)", title="documents and mean; a line each dithered model")


def draw_bits(found: Cells, axes: Any) -> None:
    sizes = sorted((64, *OTHER_BLOCK_SIZES))
    for name, double_quant in BLOCK_KINDS:
        cells = [_cell("dithered", name, size, double_quant, TOKENS) for size in sizes]
        cells = [cell for cell in cells if found.find(cell) is not None]
        bits = [_result(found, cell)["bits_per_param"] for cell in cells]
        losses = [mean(added(found, cell).values()) for cell in cells]
        style = {"color": COLOURS[name], "linestyle": "-" if double_quant else "--", "marker": "o"}
        axes.plot(bits, losses, label=label(_cell("", name, 0, double_quant, 0)), **style)
        for cell, place in zip(cells, zip(bits, losses, strict=True), strict=True):
            axes.annotate(f" {cell['block_size']}", place, fontsize=7, va="bottom", color=COLOURS[name])
    axes.set(xlabel="bits a parameter", ylabel="loss added (nats a token)", title="block sizes, dithered, seed 0")
    axes.legend(fontsize=8)


def loss_added(found: Cells, weights: str, name: str, double_quant: bool, block_size: int = 64, seed: int = 0) -> float:
    """Mean over the documents, in nats a token."""
    return mean(added(found, _cell(weights, name, block_size, double_quant, TOKENS, seed)).values())


def more_than_nf4(found: Cells, name: str) -> list[float]:
    """How much more than NF4 a type adds, both with double quantisation, in each dithered model."""
    return [
        loss_added(found, "dithered", name, True, seed=seed) - loss_added(found, "dithered", "nf4", True, seed=seed)
        for seed in SEEDS
    ]


def page_values(found: Cells) -> dict[str, str]:
    """The numbers of docs/explanation/data-types.md."""
    nf4 = [loss_added(found, "dithered", "nf4", True, seed=seed) for seed in SEEDS]
    of_one = {name: added(found, _cell("as loaded", name, 64, True, TOKENS)) for name in ("nf4", "fp4")}
    by_document = [of_one["fp4"][name] - of_one["nf4"][name] for name in DOCUMENTS]
    of_dq = [
        loss_added(found, weights, name, True) - loss_added(found, weights, name, False)
        for weights in ("as loaded", "dithered")
        for name in FOUR_BITS
    ]
    values = {
        "blocks of 64": table_of_types(found),
        "other blocks": table_of_blocks(found),
        "tokens": f"{TOKENS:,}",
        "perplexity as loaded": f"{_result(found, _cell('as loaded', 'none', 0, False, TOKENS))['perplexity']:.1f}",
        "perplexity dithered": f"{_result(found, _cell('dithered', 'none', 0, False, TOKENS))['perplexity']:.1f}",
        "between seeds": f"{max(nf4) - min(nf4):.2f}",
        "one model": f"{mean(by_document):.3f}",
        "one model error": f"{standard_error(by_document):.3f}",
        "double quantisation": f"{max(map(abs, of_dq)):.3f}",
        "bits": f"{_result(found, _cell('dithered', 'nf4', 64, True, TOKENS))['bits_per_param']:.3f}",
    }
    smaller = [
        nf4[seed] - loss_added(found, "dithered", "nf4", True, 32, seed)
        for seed in SEEDS
        if found.find(_cell("dithered", "nf4", 32, True, TOKENS, seed)) is not None
    ]
    values["blocks of 32"] = ", ".join(f"{gain:.3f}" for gain in smaller)
    for name in ("fp4", "int4"):
        values[name] = f"{mean(more_than_nf4(found, name)):.3f}"
        values[f"{name} error"] = f"{standard_error(more_than_nf4(found, name)):.3f}"
    return values


def table_of_types(found: Cells) -> str:
    """All types in blocks of 64."""
    body = []
    for name in ("int8", "nf4", "fp4", "int4", "quantile"):
        for double_quant in (False, True) if name in FOUR_BITS else (True,):
            cell = _cell("dithered", name, 64, double_quant, TOKENS)
            normal = _result(found, _cell("normal", name, 64, double_quant, 0))
            seeds = SEEDS if double_quant and name in FOUR_BITS else (0,)
            dithered = [loss_added(found, "dithered", name, double_quant, seed=seed) for seed in seeds]
            body.append(
                [
                    label(cell),
                    f"{_result(found, cell)['bits_per_param']:.3f}",
                    f"{normal['relative_error']:.4f}",
                    f"{_result(found, cell)['relative_error']:.4f}",
                    f"{loss_added(found, 'as loaded', name, double_quant):.3f}",
                    ", ".join(f"{value:.3f}" for value in dithered),
                    f"{mean(dithered):.3f}" if len(dithered) > 1 else "",
                ]
            )
    head = ["type", "bits", "relative error: normal weights", "this model", "loss added, as loaded"]
    return rows([*head, f"dithered, seeds {', '.join(map(str, SEEDS))}", "mean"], body)


def table_of_blocks(found: Cells) -> str:
    """Bits and loss added by block size, dithered weights; of several seeds where there are several."""
    body = []
    for block_size in sorted((64, *OTHER_BLOCK_SIZES)):
        line = [str(block_size)]
        for name, double_quant in BLOCK_KINDS:
            cells = [_cell("dithered", name, block_size, double_quant, TOKENS, seed) for seed in SEEDS]
            cells = [cell for cell in cells if found.find(cell) is not None]
            losses = ", ".join(f"{mean(added(found, cell).values()):.3f}" for cell in cells)
            line.append(f"{losses} ({_result(found, cells[0])['bits_per_param']:.3f} bits)")
        for weights, tokens in (("normal", 0), ("dithered", TOKENS)):
            error = _result(found, _cell(weights, "nf4", block_size, True, tokens))["relative_error"]
            line.append(f"{error:.4f}")
        body.append(line)
    kinds = [label(_cell("", name, 0, double_quant, 0)) for name, double_quant in BLOCK_KINDS]
    return rows(["block", *kinds, "relative error of NF4 + DQ: normal weights", "this model"], body)


def standard_error(values: list[float]) -> float:
    """Of their mean."""
    return stdev(values) / math.sqrt(len(values))


def _result(found: Cells, settings: Settings) -> dict[str, Any]:
    result = found.find(settings)
    if result is None:
        raise LookupError(f"not measured yet: {describe(settings)}; run this without --draw")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--draw", action="store_true", help="only draw and write what was measured")
    arguments = parser.parse_args()
    found = Cells(RESULTS / f"data_types{'_quick' * arguments.quick}.json")
    if not arguments.draw:
        found.run(quick_cells() if arguments.quick else cells(TOKENS), Bench().measure)
    if arguments.quick:
        print(*(f"{describe(record['settings'])}: {record['result']}" for record in found.records), sep="\n")
        return
    draw(found)
    write("data-types.md", page_values(found))


if __name__ == "__main__":
    main()
