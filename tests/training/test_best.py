"""The best evaluation is kept and used; a run that only learns its text by heart ends early and says why."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import MakeConfig

from longfit.errors import ConfigError, RunError
from longfit.training import run_directory
from longfit.training.best import Best, best_of, evaluations_since_best, read_best, reason_to_stop
from longfit.training.loop import train
from longfit.training.metrics import Event, read_metrics


def evaluations(*losses: float) -> list[dict[str, object]]:
    """Lines of ``metrics.jsonl`` with a step between any two evaluations."""
    lines: list[dict[str, object]] = []
    for number, loss in enumerate(losses, start=1):
        lines += [{"step": 10 * number, "loss": 1.0}, {"step": 10 * number, "eval_loss": loss}]
    return lines


def test_the_first_of_equal_ones_is_the_best() -> None:
    assert best_of([]) is None
    assert best_of(evaluations(3.0, 2.0, 2.5, 2.0)) == Best(20, 2.0)
    assert best_of(evaluations(float("nan"), 2.0)) == Best(20, 2.0)
    assert evaluations_since_best(evaluations(3.0, 2.0, 2.5, 2.0)) == 2


def test_patience_is_evaluations_in_a_row() -> None:
    assert reason_to_stop(evaluations(3.0, 2.0, 2.5), patience=2) is None
    assert reason_to_stop(evaluations(3.0, 2.0, 2.5, 2.5), patience=None) is None
    assert reason_to_stop(evaluations(3.0, 2.0, 2.5, 2.1), patience=2) == (
        "the validation loss has not fallen 2 times in a row since step 20 (2.0000): train.patience"
    )


@pytest.fixture
def overfitting(make_config: MakeConfig, tmp_path: Path):
    """One sentence to learn by heart at a rate that harms, and another kind of text held out."""
    (tmp_path / "one.txt").write_text("abc abc abc abc abc abc. " * 6)
    (tmp_path / "other.txt").write_text("zyx wvu tsr qpo nml kji. " * 6)
    return make_config(
        data__path=str(tmp_path / "one.txt"),
        data__validation=str(tmp_path / "other.txt"),
        train__steps=40,
        train__learning_rate=0.05,
        train__eval_every=2,
        train__patience=2,
        train__save_every=4,
    )


def test_an_overfitting_run_keeps_its_best_and_stops_early(overfitting) -> None:
    events = []
    result = train(overfitting, on_event=events.append)
    assert result.finished
    assert result.steps < 40
    reason = f"stopped after step {result.steps} of 40: the validation loss"
    assert any(event.text.startswith(reason) for event in events)
    records = [record for record in read_metrics(result.run_dir / "metrics.jsonl") if "eval_loss" in record]
    best = best_of(records)
    assert best is not None
    assert best.step < result.steps
    assert read_best(result.run_dir) == best
    assert [record["step"] for record in records if record["best"]][-1] == best.step
    assert run_directory.find_adapter(result.run_dir) == result.run_dir / "best"
    assert run_directory.find_adapter(result.run_dir, "last") == result.run_dir / "adapter"
    kept, last = (load_file(result.run_dir / name / "adapter_model.safetensors") for name in ("best", "adapter"))
    assert any(not kept[name].equal(last[name]) for name in kept)
    with pytest.raises(RunError, match="no checkpoint 'x'; there are best, last, step-"):
        run_directory.find_adapter(result.run_dir, "x")


def test_the_report_shows_where_it_was_best_and_why_it_ended(overfitting) -> None:
    import html

    from longfit.evaluation.compare import compare
    from longfit.evaluation.report import write_report

    run = train(overfitting.replace({"train.samples": ["<abc>"], "train.samples_every": 2})).run_dir
    best = read_best(run)
    assert best is not None
    page = write_report(
        compare(run, with_passkey=False, device=torch.device("cpu")), command="longfit eval"
    ).read_text()
    text = html.unescape(page)
    assert f"The validation loss was lowest after step {best.step} ({best.eval_loss:.4f})" in text
    last = len([record for record in read_metrics(run / "metrics.jsonl") if "loss" in record])
    assert f"The run stopped after step {last} of 40: the validation loss has not fallen 2 times in a row" in text
    assert f"best, step {best.step}" in text  # in the picture
    assert "What it said while it trained" in text
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples[-1]["step"] == last
    assert all(sample["answer"] in text for sample in samples)
    assert "<abc>" not in page
    assert "&lt;abc&gt;" in page


def test_a_run_that_stopped_early_stays_stopped(overfitting) -> None:
    result = train(overfitting)
    again = train(overfitting, resume=True)
    assert (again.finished, again.steps) == (True, result.steps)


def test_keep_best_can_be_switched_off(overfitting) -> None:
    result = train(overfitting.replace({"train.keep_best": False, "train.steps": 4}))
    assert not (result.run_dir / "best").exists()
    assert run_directory.find_adapter(result.run_dir) == result.run_dir / "adapter"


def test_patience_without_validation_is_refused_and_validation_offered(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"no validation text: add data.validation=FILE"):
        train(make_config(train__patience=2))
    events = []
    train(make_config(train__steps=1), on_event=events.append)
    assert any("data.validation_fraction=0.05 holds some documents out" in event.text for event in events)


def test_one_document_is_not_offered_to_be_divided(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the long road went on and on. " * 40)
    events: list[Event] = []
    train(make_config(train__steps=1, data__path=str(tmp_path / "book.txt")), on_event=events.append)
    offered = [event.text for event in events if "no validation text" in event.text]
    assert len(offered) == 1
    assert offered[0].endswith("data.validation=FILE names one")


def test_samples_are_answered_as_the_model_is(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "document.txt").write_text("the road went on. " * 3)
    config = make_config(
        train__samples=["the", "who"], train__samples_every=2, train__samples_tokens=5, train__steps=3,
        train__samples_document=str(tmp_path / "document.txt"),
    )  # fmt: skip
    result = train(config)
    lines = [json.loads(line) for line in (result.run_dir / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [(2, "the"), (2, "who"), (3, "the"), (3, "who")]
    assert all(line["answer"] for line in lines)
    from longfit.evaluation.generate import generate
    from longfit.evaluation.reader import Reader
    from longfit.evaluation.tokens import encode
    from longfit.training.prepare import open_run

    model, tokenizer, _ = open_run(result.run_dir)
    text = f"{(tmp_path / 'document.txt').read_text()}\n\nwho"
    pieces = generate(Reader(model), tokenizer, encode(tokenizer, text), max_new_tokens=5)
    assert "".join(pieces) == lines[-1]["answer"]
    assert json.dumps(lines)  # read back by the report
