"""A run, unbroken, broken off, resumed, refused; on a tiny Llama with real files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.families.tiny_family import tiny_family
from tests.moe_models import save_mixture
from tests.training.conftest import MakeConfig
from tests.training.tiny import interrupt_at, read_losses, save_tiny_model

from longfit.config import sections
from longfit.engine.loss.training_loss import training_loss
from longfit.errors import ConfigError, RunError
from longfit.model.load import read_tokenizer
from longfit.training import start
from longfit.training.checkpoint import read_state
from longfit.training.computed_with import computed_with
from longfit.training.loop import TrainResult, train
from longfit.training.metrics import Event, read_metrics
from longfit.training.prepare import open_run
from longfit.training.prepare_data import pack_documents, read_data
from longfit.training.run_directory import last_checkpoint, read_config
from longfit.training.run_list import list_runs


def numbers(run_dir: Path) -> list[tuple[object, ...]]:
    """What must not depend on where a run was broken: everything but times and memory."""
    keys = ("step", "loss", "grad_norm", "lr", "eval_loss", "tokens", "trained_tokens")
    return [tuple(record.get(key) for key in keys) for record in read_metrics(run_dir / "metrics.jsonl")]


FLOAT32 = {"adapter__dropout": 0.1, "context__attention": "shifted", "context__group_size": 32}
BFLOAT16 = {
    "model__quant": "nf4",
    "model__dtype": "bfloat16",
    "adapter__dropout": 0.1,
    "adapter__train_embeddings": True,
    "adapter__train_norms": True,
    "train__batch_size": 2,
    "engine__engine": "plain",
    "optim__optim": "adamw8bit",
}


@pytest.mark.parametrize("settings", [FLOAT32, BFLOAT16], ids=["sweep", "plain-8bit-norms-embeddings"])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, settings: dict[str, object]
) -> None:
    settings = {
        **settings,
        "train__steps": 5,
        "train__gradient_accumulation": 2,
        "train__eval_every": 2,
        "data__validation_fraction": 0.2,
    }
    whole = train(make_config(**settings, output__run_dir=str(tmp_path / "whole")))
    broken = train(make_config(**settings), on_event=interrupt_at(3))
    assert (broken.finished, broken.steps) == (False, 3)
    assert broken.checkpoint.name == "step-000003"
    torch.rand(7)  # what happens to the generators in between does not matter
    resumed = train(make_config(**settings), resume=True)
    assert (resumed.finished, resumed.steps, resumed.tokens) == (True, 5, whole.tokens)
    assert numbers(resumed.run_dir) == numbers(whole.run_dir)
    for name in ("trainable.safetensors", "optimizer.pt"):
        assert (resumed.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()
    adapters = [(run.run_dir / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, resumed)]
    assert adapters[0] == adapters[1]


def test_a_resumed_run_may_be_moved_and_may_save_more_often(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(), on_event=interrupt_at(2))
    (tmp_path / "run").rename(tmp_path / "moved")
    config = make_config(output__run_dir=str(tmp_path / "moved"), train__save_every=1, engine__tile=16)
    warnings: list[str] = []
    result = train(config, resume=True, on_event=lambda e: warnings.append(e.text) if e.kind == "warning" else None)
    assert result.finished
    assert [path.name for path in sorted((tmp_path / "moved" / "checkpoints").iterdir())] == [
        "step-000003",
        "step-000004",
    ]
    assert any(text.startswith("engine.tile changed from None to 16") for text in warnings)


def test_a_run_that_goes_on_with_other_kernels_is_told_so(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library built anew may add in another order: a resumed run would differ in rounding, and nobody knew why."""

    def warnings_of(**resume: bool) -> list[str]:
        texts: list[str] = []
        stop = interrupt_at(2 if not resume else 3)

        def on_event(event: Event) -> None:
            texts.append(event.text) if event.kind == "warning" else None
            stop(event)

        train(make_config(), on_event=on_event, **resume)
        return [text for text in texts if text.startswith("computed so far with")]

    assert warnings_of() == []
    assert warnings_of(resume=True) == []
    now = {**computed_with(), "kernels": "built anew"}
    monkeypatch.setattr(start, "computed_with", lambda: now)
    (told,) = warnings_of(resume=True)
    assert told == (
        f"computed so far with kernels {computed_with()['kernels']}, now built anew: losses may differ from an unbroken"
        " run in rounding"
    )
    assert read_state(last_checkpoint(tmp_path / "run")).computed_with == now


def test_nothing_is_written_into_an_existing_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="already exists and is not overwritten; choose another"):
        train(make_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match=r"holds no config\.yaml"):
        train(make_config(), resume=True)
    with pytest.raises(RunError, match="is not there"):
        train(make_config(output__run_dir=str(tmp_path / "nowhere")), resume=True)


def test_a_failed_preparation_leaves_no_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        train(make_config(model__device="cuda:7"))
    assert not (tmp_path / "run").exists()


def test_accumulation_equals_one_large_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    def first_step(name: str, **settings: object) -> dict[str, object]:
        result = train(make_config(**settings, train__steps=1, output__run_dir=str(tmp_path / name)))
        return read_metrics(result.run_dir / "metrics.jsonl")[0]

    large = first_step("large", train__batch_size=4)
    small = first_step("small", train__gradient_accumulation=4)
    assert large["trained_tokens"] == small["trained_tokens"]
    # Sums of about 400 float32 losses (and gradients) in another order: relative error below 400 * 2^-24 = 2.4e-5.
    assert small["loss"] == pytest.approx(large["loss"], rel=2.4e-5)
    assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=2.4e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state_before_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(
        RunError, match=r"step 2: the (loss|gradient norm) is (nan|inf) on window \d+ \(text\d.txt"
    ) as caught:
        train(make_config(train__learning_rate=1e30, train__warmup_steps=0))
    assert str(tmp_path / "run" / "checkpoints" / "step-000001") in str(caught.value)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_training_learns_and_leaves_a_complete_run(make_config: MakeConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    config = make_config(
        train__steps=12,
        train__learning_rate=2e-2,
        context__context=400,
        data__validation_fraction=0.2,
        train__eval_every=6,
    )
    result = train(config, on_event=events.append)
    assert result.loss < result.first_loss - 0.2
    assert (result.finished, result.steps, result.total_steps) == (True, 12, 12)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "data.json", "documents.digests", "family.json", "ledger.json", "metrics.jsonl",
        "plan.json", "run.json", "checkpoints", "adapter", "best",
    }  # fmt: skip
    assert json.loads((run / "ledger.json").read_text())["num_documents"] == 5
    warnings = [event.text for event in events if event.kind == "warning"]
    assert any(text.startswith("context 400 is longer than any document") for text in warnings)
    assert [event.values["step"] for event in events if event.kind == "eval"] == [6, 12]

    # The directory alone is enough to use the result, and what is loaded is what was trained.
    model, tokenizer, stored = open_run(run, device=torch.device("cpu"))
    _, held_out = read_data(stored)
    assert held_out is not None
    window = pack_documents(held_out, tokenizer, stored)[0]
    with torch.no_grad():
        loss = training_loss(model, window["input_ids"][None], position_ids=window["position_ids"][None])
    # One window of the same operations in the same order; only threads and memory alignment differ.
    assert loss.item() == pytest.approx(result.eval_loss, rel=1e-5)

    found = list_runs(tmp_path)
    assert [(run.step, run.finished, run.loss) for run in found] == [(12, True, result.loss)]


def test_a_finished_run_resumes_to_its_result(make_config: MakeConfig, tmp_path: Path) -> None:
    result = train(make_config(train__steps=1))
    shutil.rmtree(tmp_path / "run" / "adapter")
    again: TrainResult = train(make_config(train__steps=1), resume=True)
    assert (again.finished, again.steps, again.loss) == (True, 1, result.loss)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_every_setting_is_read_by_a_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "model")
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path / "cache"))
    config = make_config(
        data__validation_fraction=0.2,
        data__cache="on",
        adapter__train_norms=True,
        context__attention="shifted",
        engine__offload="file",
        engine__offload_folder=str(tmp_path),
        engine__stream="file",
        engine__stream_folder=str(tmp_path),
        optim__budget="8MiB",
        optim__file=str(tmp_path / "state"),
        train__samples=["the"],
    )
    read: set[str] = set()

    def recording(name: str) -> object:
        def get(section: object, attribute: str) -> object:
            read.add(f"{name}.{attribute}")
            return object.__getattribute__(section, attribute)

        return get

    for name, section in sections.SECTIONS.items():
        monkeypatch.setattr(section, "__getattribute__", recording(name))
    train(config)
    assert set(sections.known_keys()) - read == set()
    assert read_config(tmp_path / "run").context.group_size == 24  # a quarter of the context, as the model was extended


@pytest.mark.parametrize("engine", ["sweep", "plain"])
def test_documents_of_a_recurrent_model_share_a_window_where_the_sweep_keeps_them_apart(
    engine: str, make_config: MakeConfig, workplace: Path, tmp_path: Path
) -> None:
    """The first loss is that of each document read alone by the model as it is."""
    family = tiny_family("qwen3_5_text", vocab_size=33)
    base = tmp_path / "recurrent"
    family.model.float().save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((workplace / "model" / name).read_bytes())
    texts = ["the long road", "went on and on", "past hills", "and rivers"]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    said = []
    settings = {"model__name": str(base), "data__path": str(tmp_path / "texts"), "engine__engine": engine}
    config = make_config(**settings, train__steps=1, adapter__rank=2, train__gradient_accumulation=4)
    if engine == "sweep":
        config = config.replace({"train.gradient_accumulation": 1})
    assert train(config, on_event=lambda event: said.append(event.text)).finished
    alone = [line for line in said if line.startswith("one document a window")]
    assert len(alone) == (0 if engine == "sweep" else 1)
    tokenizer = read_tokenizer(base)
    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
            logits = family.model(input_ids=ids, use_cache=False).logits
            total += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    assert read_losses(tmp_path / "run")[0] == pytest.approx(total / count, rel=1e-4)


def test_a_mixture_streamed_from_a_file_trains_as_in_memory(make_config: MakeConfig, tmp_path: Path) -> None:
    base = save_mixture(tmp_path / "base", "qwen3_moe")
    (tmp_path / "book.txt").write_text("the long road went on and on, past hills and rivers.\n" * 9)
    losses = {}
    for place in ("none", "file"):
        settings = {"model__name": str(base), "model__quant": "nf4", "data__path": str(tmp_path / "book.txt")}
        out = tmp_path / f"run-{place}"
        config = make_config(
            **settings, context__context=64, adapter__experts=True, engine__stream=place, output__run_dir=str(out)
        )
        assert train(config).finished
        losses[place] = read_losses(out)
    assert losses["file"] == losses["none"]
