"""Experiment 5: does a model use the longer context? Recall by depth and length, before and after extension.

A small model is trained from scratch at its native context on multi-query associative recall (`recall_task.py`) until
it answers. Then its context is extended fourfold, in several ways, on equal numbers of tokens, and it is asked at up to
eight times the native context, always with exact attention. The answer to a question stands once in the sequence, at a
random place; whoever has not read it is right as often as chance.

Decided beforehand: an arm *uses its context* if at distances beyond the native context it answers 20 points more than
YaRN without training; *shifted is close to exact* if it is within 5 points there. Neither is judged where a base
answers less than 95 % at its native context: such a model has not learned to recall at all.

    python -m benchmarks.experiments.context_use            some core-hours; context_use.json, figure, page
    python -m benchmarks.experiments.context_use --quick    a small pilot of all arms, context_use_quick.*
    python -m benchmarks.experiments.context_use --draw     figure and page from what was measured

It may be interrupted at any time: finished cells stay, a trained base model waits in build/.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from benchmarks.experiments.cells import RESULTS, ROOT, Cells, Settings
from benchmarks.experiments.figures import panels
from benchmarks.experiments.pages import rows, write
from benchmarks.experiments.recall_task import Sequences, Task, corrupt, draw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from longfit.attention.hf_attention import attention_key
from longfit.engine.hf_model import base_model
from longfit.engine.loss.training_loss import training_loss
from longfit.evaluation.evaluation_mode import measured
from longfit.evaluation.passkey import wilson
from longfit.layers.linear4bit import Linear4bit
from longfit.model.adapters import add_adapters
from longfit.model.context import extend_context
from longfit.model.hf_quantizer import skipped_linears
from longfit.optim.adamw import PagedAdamW
from longfit.training.optimizer import clip_gradients
from longfit.training.schedule import learning_rate

FACTOR, DEPTHS = 4, 8
LEARNED = 0.95  # of the bases' answers, before anything is judged
TRAINED_BASES = ROOT / "build" / "context_use"


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        layers, hidden, heads: of the model, whose head dimension is hidden / heads.
        native: tokens the base is made for.
        pairs, keys, values: of the task.
        batch: sequences of the native length in a step; fewer of longer ones, so that tokens are equal.
        base_steps, arm_steps: optimiser steps.
        asked: sequences at each length.
        seeds: of base, adapters and data.
        peak: learning rate after the warm-up.
    """

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    native: int = 256
    pairs: int = 16
    keys: int = 64
    values: int = 64
    batch: int = 64
    base_steps: int = 3000
    arm_steps: int = 400
    asked: int = 64
    seeds: int = 3
    peak: float = 1e-3

    @property
    def task(self) -> Task:
        """The task at this size."""
        return Task(self.pairs, self.keys, self.values)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that the models are asked at: the native context to eight times as many."""
        return tuple(self.native * factor for factor in (1, 2, 4, 8))


PILOT = Size(2, 64, 2, 32, 3, 8, 8, 32, 1200, 60, 64, 1, 3e-3)


@dataclass(frozen=True)
class Arm:
    """One way to extend the context.

    Attributes:
        name: in tables.
        rope: scaling of the positions.
        trained: whether there is any training.
        window: tokens in a training window, in native contexts.
        group: tokens of a shifted group, as a share of the window; None trains with exact attention.
        exact_share: the last share of the steps, trained with exact attention.
        whole: train norms and embeddings, too.
        quant: storage of the base while the adapters train.
    """

    name: str
    rope: str = "yarn"
    trained: bool = True
    window: int = FACTOR
    group: float | None = None
    exact_share: float = 0.0
    whole: bool = True
    quant: str = "none"


ARMS = (
    Arm("unscaled, untrained", rope="none", trained=False),
    Arm("NTK, untrained", rope="ntk", trained=False),
    Arm("YaRN, untrained", trained=False),
    Arm("exact"),
    Arm("exact, no norms, no embeddings", whole=False),
    Arm("shifted, G = 1/4", group=1 / 4),
    Arm("shifted, G = 1/2", group=1 / 2),
    Arm("shifted, G = 1/4, last quarter exact", group=1 / 4, exact_share=1 / 4),
    Arm("exact, NF4 with double quantisation", quant="nf4"),
    Arm("control: native windows", window=1),
)
UNTRAINED, EXACT = "YaRN, untrained", "exact"


def cells(size: Size) -> Iterator[Settings]:
    """One base for each seed, then the arms."""
    for seed in range(size.seeds):
        yield {"part": "base", "seed": seed, "size": asdict(size)}
    for seed in range(size.seeds):
        for arm in ARMS:
            yield {"part": "arm", "seed": seed, "size": asdict(size), "arm": asdict(arm)}


def measure(settings: Settings) -> dict[str, Any]:
    """A base at its native context, or an arm at all lengths."""
    size, seed = Size(**settings["size"]), settings["seed"]
    model = trained_base(size, seed)
    if settings["part"] == "base":
        return {"asked": [ask(model, size, length=size.native, seed=seed)]}
    arm = Arm(**settings["arm"])
    model, losses = extended(model, size, arm, seed)
    asked = [ask(model, size, length=length, seed=seed) for length in size.lengths]
    corrupted = ask(model, size, length=FACTOR * size.native, seed=seed, corrupted=True)
    return {"asked": asked, "corrupted": corrupted["right"], "loss": losses}


def fresh_model(size: Size, seed: int) -> LlamaForCausalLM:
    """A random Llama of this size, with tied embeddings, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.task.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.native,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention_key())


def trained_base(size: Size, seed: int) -> LlamaForCausalLM:
    """The base of a seed, trained at its native context now or in an earlier run."""
    model = fresh_model(size, seed)
    name = sha256(json.dumps([asdict(size), seed]).encode()).hexdigest()[:12]
    path = TRAINED_BASES / f"{name}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path), strict=False)
        model.tie_weights()
        return model
    losses = train(model, size, steps=size.base_steps, window=size.native, seed=seed)
    print(f"    base of seed {seed}: loss {losses[-1]:.4f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    save_file({key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}, beside)
    beside.replace(path)
    return model


def extended(model: LlamaForCausalLM, size: Size, arm: Arm, seed: int) -> tuple[nn.Module, list[float]]:
    """The base extended fourfold as an arm does it, and its losses on the way."""
    context = FACTOR * size.native
    if arm.quant != "none":
        quantise(model, arm.quant)
    extend_context(model, context=context, rope=arm.rope)
    if not arm.trained:
        return model, []
    torch.manual_seed(seed)
    adapted = add_adapters(model, rank=16, alpha=32, train_embeddings=arm.whole, train_norms=arm.whole)
    window = arm.window * size.native
    exact_from = round(size.arm_steps * (1 - arm.exact_share))
    losses: list[float] = []
    for steps, group in ((exact_from, arm.group), (size.arm_steps - exact_from, None)):
        key = attention_key() if group is None else attention_key("shifted", int(group * window) // 2 * 2)
        base_model(adapted).set_attn_implementation(key)
        first = len(losses)
        losses += train(adapted, size, steps=steps, window=window, seed=seed + 1000 + first, of=size.arm_steps)
    return adapted, losses


def quantise(model: LlamaForCausalLM, quant_type: str) -> None:
    """Store the linear layers in 4 bits with double quantisation, those that ``longfit.load`` would."""
    skipped = skipped_linears(model, [])
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in skipped:
            model.set_submodule(name, Linear4bit.from_linear(module, quant_type=quant_type))


def train(model: nn.Module, size: Size, *, steps: int, window: int, seed: int, of: int | None = None) -> list[float]:
    """Train on fresh sequences; the same number of tokens in a step whatever the window.

    Returns: the loss of each step, in nats an answer.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW(parameters, lr=size.peak)
    batch, losses = max(1, size.batch * size.native // window), []
    model.train()
    for step in range(steps):
        sequences = draw(size.task, batch=batch, length=window, generator=generator)
        loss = training_loss(model, sequences.ids, labels=sequences.labels, engine="plain")
        loss.backward()
        clip_gradients(parameters, 1.0)
        rate = learning_rate(step, size.peak, total_steps=of or steps, warmup_steps=(of or steps) // 20)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"    step {step + 1}/{steps}: {sum(losses[-100:]) / 100:.4f}", flush=True)
    return losses


@torch.no_grad()
def ask(model: nn.Module, size: Size, *, length: int, seed: int, corrupted: bool = False) -> dict[str, Any]:
    """Ask for every pair of held-out sequences, with exact attention.

    Returns: the length; how many answers were right, of how many, and their loss; the same by depth, and beyond the
        native context.
    """
    generator = torch.Generator().manual_seed(10**6 + seed)  # no seed of training
    right, loss, depth, distance = [], [], [], []
    base = base_model(model)
    with measured(model):
        base.set_attn_implementation(attention_key())
        for _ in range(size.asked):
            sequences = draw(size.task, batch=1, length=length, generator=generator)
            if corrupted:
                sequences = corrupt(sequences, size.task, generator=generator)
            logits, expected = answers(base, sequences)
            right.append(logits.argmax(1) == expected)
            loss.append(torch.nn.functional.cross_entropy(logits, expected, reduction="none"))
            depth.append(sequences.depth[0])
            distance.append(sequences.distance[0])
    hits, nats = torch.cat(right), torch.cat(loss)
    bins = (torch.cat(depth) * DEPTHS).long().clamp(max=DEPTHS - 1)
    beyond = torch.cat(distance) > size.native
    return {
        "length": length,
        "right": share(hits),
        "nll": float(nats.mean()),
        "by_depth": [share(hits[bins == index]) for index in range(DEPTHS)],
        "beyond": share(hits[beyond]),
        "beyond_nll": float(nats[beyond].mean()) if bool(beyond.any()) else None,
    }


def answers(base: Any, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Logits where the values are asked for ``[pairs, V]``, and the values ``[pairs]``; the value itself is unseen."""
    at = sequences.answers[0] - 1
    hidden = base.model(input_ids=sequences.ids, use_cache=False).last_hidden_state[0, at]
    return base.get_output_embeddings()(hidden).float(), sequences.labels[0, at + 1]


def share(hits: Tensor) -> list[int]:
    """Right answers, and answers in all."""
    return [int(hits.sum()), hits.numel()]


def pooled(found: Cells, size: Size, arm: Arm, pick: Any) -> tuple[int, int]:
    """Right answers and answers in all of an arm's seeds."""
    results = [record["result"] for record in found.select(part="arm", size=asdict(size), arm=asdict(arm))]
    counts = [pick(result) for result in results]
    return sum(count[0] for count in counts), sum(count[1] for count in counts)


def percent(right: int, asked: int) -> str:
    """A share with its Wilson interval."""
    if not asked:
        return "-"
    low, high = wilson(right, asked)
    return f"{100 * right / asked:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def at(length: int, key: str) -> Any:
    """Picks a count of an arm's result at a length."""
    return lambda result: next(asked[key] for asked in result["asked"] if asked["length"] == length)


def table(found: Cells, size: Size) -> str:
    """Right answers by length, of all needles, and of those beyond the native context at the length trained for."""
    trained = FACTOR * size.native
    body = []
    for arm in ARMS:
        lengths = [percent(*pooled(found, size, arm, at(length, "right"))) for length in size.lengths]
        beyond = percent(*pooled(found, size, arm, at(trained, "beyond")))
        body.append([arm.name, *lengths, beyond, percent(*pooled(found, size, arm, lambda r: r["corrupted"]))])
    head = ["arm", *(f"{length:,} tokens" for length in size.lengths)]
    return rows([*head, f"{trained:,}: farther than {size.native:,}", "needles corrupted"], body)


def verdicts(found: Cells, size: Size) -> str:
    """What was decided beforehand, arm by arm."""
    beyond = {arm.name: pooled(found, size, arm, at(FACTOR * size.native, "beyond")) for arm in ARMS}
    points = {name: 100 * right / asked for name, (right, asked) in beyond.items() if asked}
    body = []
    for arm in ARMS:
        if not arm.trained or arm.name not in points:
            continue
        gain, behind = points[arm.name] - points[UNTRAINED], points[EXACT] - points[arm.name]
        close = "-" if arm.group is None else verdict(found, size, behind <= 5)
        body.append([arm.name, f"{gain:+.0f}", verdict(found, size, gain >= 20), f"{-behind:+.0f}", close])
    return rows(["arm", "points over YaRN untrained", "uses its context", "points from exact", "close to exact"], body)


def verdict(found: Cells, size: Size, holds: bool) -> str:
    """Yes or no, where every base has learned the task."""
    counts = [record["result"]["asked"][0]["right"] for record in found.select(part="base", size=asdict(size))]
    if not counts or any(right < LEARNED * asked for right, asked in counts):
        return "not judged: base below 95 %"
    return "yes" if holds else "no"


def bases(found: Cells, size: Size) -> str:
    """Right answers of the bases at the native context, by seed."""
    shares = [
        percent(*record["result"]["asked"][0]["right"]) for record in found.select(part="base", size=asdict(size))
    ]
    return "; ".join(shares) or "none trained yet"


def page_values(found: Cells, size: Size) -> dict[str, str]:
    """The places of docs/explanation/context-use.md."""
    return {
        "kind": "the pilot" if size == PILOT else "the whole experiment",
        "size": (
            f"{size.layers} layers, hidden size {size.hidden}, native context {size.native}, {size.pairs} pairs of "
            f"{size.keys} keys and {size.values} values, {size.base_steps:,} steps for the base and "
            f"{size.arm_steps:,} for an arm, {size.seeds} seeds"
        ),
        "bases": bases(found, size),
        "chance": f"{100 * size.task.chance:.1f}",
        "seen": f"{100 / size.pairs:.0f}",
        "arms": table(found, size),
        "verdicts": verdicts(found, size),
    }


def figure(found: Cells, size: Size) -> None:
    """Right answers by depth at the length trained for, and by length."""
    shown = [arm for arm in ARMS if arm.name in (UNTRAINED, EXACT, "shifted, G = 1/4", "control: native windows")]
    with panels("context-use.png", 2) as (by_depth, by_length):
        for arm in shown:
            depths = [
                pooled(found, size, arm, lambda r, i=index: at(FACTOR * size.native, "by_depth")(r)[i])
                for index in range(DEPTHS)
            ]
            places = [(index + 0.5) / DEPTHS for index in range(DEPTHS)]
            by_depth.plot(places, [100 * right / max(1, asked) for right, asked in depths], marker="o", label=arm.name)
            counts = [pooled(found, size, arm, at(length, "right")) for length in size.lengths]
            by_length.plot(size.lengths, [100 * right / max(1, asked) for right, asked in counts], marker="o")
        by_depth.set(xlabel=f"depth of the needle in {FACTOR * size.native:,} tokens", ylabel="answers right, %")
        by_length.set(xlabel="tokens", ylabel="answers right, %", xscale="log")
        by_length.axvline(size.native, linestyle=":", color="grey")
        by_depth.legend()


def newest() -> tuple[Cells, Size]:
    """What the page tells: the whole experiment where it was measured, else the pilot."""
    whole = Cells(RESULTS / "context_use.json")
    return (whole, Size()) if whole.select(part="arm") else (Cells(RESULTS / "context_use_quick.json"), PILOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the pilot: a small model, one seed")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    size = PILOT if arguments.quick else Size()
    found = Cells(RESULTS / f"context_use{'_quick' * arguments.quick}.json")
    if not arguments.draw:
        found.run(cells(size), measure)
    if found.select(part="arm", size=asdict(size)):
        found, size = newest()
        figure(found, size)
        write("context-use.md", page_values(found, size))


if __name__ == "__main__":
    main()
