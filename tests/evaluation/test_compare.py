"""Base against tuned, each number recomputed with plain transformers and PEFT, and what is read of which text."""

import math
import statistics
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.evaluation.finished_run import CONTEXT, NATIVE
from tests.model_folders import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from longfit.errors import ConfigError, DataError, RunError
from longfit.evaluation.compare import (
    PASSKEY_GRIDS,
    compare,
    long_windows,
    passkey_grid,
    read_text,
    short_windows,
    verdict,
)
from longfit.training.run_directory import read_config

CPU = torch.device("cpu")


@torch.no_grad()
def plain_losses(model, ids: torch.Tensor, window: int) -> list[torch.Tensor]:
    """Losses of every window on its own, from full logits."""
    rows = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    logits = [model.eval()(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    return [
        torch.nn.functional.cross_entropy(made[:-1].double(), row[1:], reduction="none")
        for made, row in zip(logits, rows, strict=True)
    ]


def test_every_number_is_that_of_plain_transformers_and_peft(run: Path) -> None:
    parts: list[str] = []

    def progress(name: str):
        parts.append(name)
        return nullcontext(None)

    found = compare(run, trials=1, device=CPU, progress=progress)
    assert [state.name for state in found.states] == ["base", "extended", "tuned"]
    assert (found.context, found.native_context, found.window, found.held_out) == (CONTEXT, NATIVE, CONTEXT, True)
    assert (found.num_documents, found.num_tokens) == (1, 1024)
    assert parts[1].startswith("base: perplexity by position")
    assert len(parts) == 1 + 3 + 1 + 3

    config = AutoConfig.from_pretrained(run / "adapter")
    models = {
        "base": AutoModelForCausalLM.from_pretrained(run.parent / "model", dtype=torch.float32),
        "extended": AutoModelForCausalLM.from_pretrained(run.parent / "model", config=config, dtype=torch.float32),
    }
    tuned_base = AutoModelForCausalLM.from_pretrained(run.parent / "model", config=config, dtype=torch.float32)
    models["tuned"] = PeftModel.from_pretrained(tuned_base, str(run / "adapter"))
    ids = torch.tensor(byte_tokenizer()((run.parent / "held-out.txt").read_text()).input_ids)
    short = {}
    for state in found.states:
        losses = plain_losses(models[state.name], ids, CONTEXT)
        # float32: losses of some 6 nats, sums in other orders
        assert state.long.nll == pytest.approx(float(torch.cat(losses).mean()), abs=2e-5)
        assert [bucket.stop for bucket in state.long.by_position] == list(range(32, CONTEXT + 1, 32))
        second = torch.cat([row[31:63] for row in losses])  # a window's first token is not scored
        assert state.long.by_position[1].nll == pytest.approx(float(second.mean()), abs=2e-5)
        short[state.name] = [float(row.mean()) for row in plain_losses(models[state.name], ids, NATIVE)]
    assert len({round(state.long.nll, 4) for state in found.states}) == 3  # three different models

    differences = [after - before for before, after in zip(short["base"], short["tuned"], strict=True)]
    check = found.short_context
    assert (check.window, check.num_windows) == (NATIVE, len(differences)) == (64, 17)
    assert check.difference == pytest.approx(statistics.fmean(differences), abs=2e-5)
    assert check.standard_error == pytest.approx(statistics.stdev(differences) / math.sqrt(17), abs=2e-5)
    assert check.verdict == verdict(check.difference, check.standard_error)
    base, extended, tuned = found.states
    assert extended.passkey is None
    assert base.passkey is not None
    assert {cell.length for cell in base.passkey.cells} == {CONTEXT}
    assert tuned.passkey is not None
    assert [t.key for t in tuned.passkey.trials] == [t.key for t in base.passkey.trials]


def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a short text")
    with pytest.raises(DataError, match=r"longest of 1 has 12 tokens, a window 512; .* with --window 12"):
        compare(run, data=str(tmp_path / "short.txt"), device=CPU)
    with pytest.raises(ConfigError, match=r"window 100: a passkey prompt has at least \d+ tokens; add --no-passkey"):
        compare(run, window=100, device=CPU)
    with pytest.raises(ConfigError, match="effort 0"):
        compare(run, effort=0, device=CPU)
    with pytest.raises(RunError, match="no run to read"):
        compare(tmp_path, device=CPU)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(RunError, match="no adapter and no checkpoint"):
        compare(tmp_path, device=CPU)


def test_which_text_is_read(run: Path, tmp_path: Path) -> None:
    tokenizer, config = byte_tokenizer(), read_config(run)
    own = read_text(config, tokenizer, None)
    assert (own.name, own.held_out) == (str(run.parent / "held-out.txt"), True)
    assert [len(ids) for ids in own.documents] == [1100]
    given = read_text(config, tokenizer, str(run.parent / "texts"))
    assert (len(given.documents), given.held_out) == (1, False)
    plain = read_text(config.replace({"data.validation": None}), tokenizer, None)
    assert "tarfile" in plain.name
    assert tokenizer.decode(plain.documents[0]).count("class TarFile(") == 1
    assert not plain.held_out


def test_windows_are_whole_and_within_the_budget() -> None:
    documents = [torch.arange(9), torch.arange(35), torch.arange(100, 121)]
    assert [ids.tolist() for ids in long_windows(documents, 10, budget=45)] == [
        list(range(30)),
        list(range(100, 110)),
    ]
    assert [len(ids) for ids in long_windows(documents, 20, budget=1)] == [20]  # at least one
    rows = short_windows(documents, 5, 20)
    assert [row[0].item() for row in rows] == [0, 10, 25, 105]  # of 1 + 7 + 4 windows, every third
    assert all(len(row) == 5 for row in rows)
    assert len(short_windows(documents, 5, 1)) == 2
    assert len(short_windows([torch.arange(7)], 5, 100)) == 1


@pytest.mark.parametrize("budget", [10, 30_000, 60_000, 200_000, 10**7])
@pytest.mark.parametrize("trials", [None, 1, 3])
def test_the_passkey_grid_keeps_to_its_budget(budget: int, trials: int | None) -> None:
    grid = passkey_grid(16_384, shortest=100, budget=budget, trials=trials)
    counts = dict(zip(grid["depths"], grid["trials"], strict=True))
    read = max(counts) * 16_384 + sum(
        length * (1 - depth) * count for length in grid["lengths"] for depth, count in counts.items()
    )
    poorest = tuple(16_384 // part for part in PASSKEY_GRIDS[-1][0])
    assert read <= budget or tuple(grid["lengths"]) == poorest
    assert all(count == trials or (trials is None and 1 <= count <= 5) for count in counts.values())
    assert counts.get(1.0, trials or 5) == (trials or 5), "a key at the end costs no reading"
    if budget == 10**7:
        assert grid["lengths"] == [4096, 8192, 16_384]
        assert set(counts.values()) == {trials or 5}
    assert passkey_grid(300, shortest=100, budget=budget, trials=1)["lengths"][-1] == 300


@pytest.mark.parametrize(
    ("difference", "error", "expected"),
    [
        (-0.05, 0.01, "better"),
        (0.05, 0.01, "worse"),
        (0.002, 0.003, "unchanged"),
        (0.02, 0.02, "unclear"),
        (-0.004, 0.001, "unchanged"),  # sure, and too small to notice
        (0.1, math.nan, "unclear"),
    ],
)
def test_verdicts(difference: float, error: float, expected: str) -> None:
    assert verdict(difference, error) == expected
