"""``longfit plan``: an answer without torch, tables that add up, nonsense refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.planning.configs import FOLDER

import longfit
from longfit.cli.app import main

LLAMA, SMOL = (str(FOLDER / f"{name}.json") for name in ("Llama-3.1-8B", "SmolLM2-135M"))


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_a_plan_imports_nothing_heavy() -> None:
    code = (
        "import sys; from longfit.cli.app import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules))); sys.exit(code)"
    )
    words = ["plan", LLAMA, "--context", "100k", "--vram", "24GiB", "--ram", "64GiB"]
    environment = {**os.environ, "PYTHONPATH": str(Path(longfit.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_what_does_not_fit_comes_with_a_ladder(capsys: pytest.CaptureFixture[str]) -> None:
    out = told([LLAMA, "--context", "100k", "--vram", "12GiB", "--ram", "64GiB", "--rank", "32"], capsys)
    assert "does not fit: accelerator needs" in out
    assert "layer inputs" in out
    assert "longfit train" in out
    assert "engine.offload=ram" in out


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(told([SMOL, "--context", "8k", "--cpu", "--ram", "8GiB", "--json"], capsys))
    assert found["fits"] is True
    for phase, places in found["phases"].items():
        total = sum(c["by_phase"].get(phase, 0) for c in found["components"] if c["place"] == "host")
        assert places["host"] == total
    assert found["peaks"]["host"] == max(
        places["host"] for phase, places in found["phases"].items() if phase != "merge"
    )
    assert found["seconds_per_step"] is None or len(found["seconds_per_step"]) == 2


def test_the_longest_context_and_a_row_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(told([LLAMA, "--max-context", "--vram", "24GiB", "--ram", "256GiB", "--json"], capsys))
    contexts = [row["context"] for row in rows]
    assert 0 < contexts[0] < contexts[1] < contexts[2]
    cards = json.loads(told([LLAMA, "--context", "64k", "--gpus", "t4,h100", "--json"], capsys))
    assert [(row["gpu"], row["fits"]) for row in cards] == [("t4", "no"), ("h100", "yes")]
    assert "t4" in told([LLAMA, "--max-context", "--gpus", "t4"], capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([LLAMA], "--max-context"),
        ([LLAMA, "--context", "4k", "--max-context"], "not both"),
        ([LLAMA, "--context", "lots", "--cpu"], "--context lots"),
        ([LLAMA, "--context", "4k", "--vram", "24"], "did you mean 24GiB"),
        ([LLAMA, "--context", "4k", "--vram", "-24GiB"], "--vram -24GiB"),
        ([LLAMA, "--context", "4k", "--gpus", "gtx1"], "unknown"),
        ([LLAMA, "--context", "4k", "--cpu", "--vram", "24GiB"], "--cpu"),
        ([LLAMA, "--context", "4k", "--gpus", "t4", "--vram", "24GiB"], "--gpus"),
        ([LLAMA, "--context", "4k", "--cpu", "--rank", "0"], "rank 0"),
    ],
)
def test_nonsense_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_encoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))
    assert main(["plan", str(tmp_path), "--context", "4k", "--cpu"]) == 2
    assert "decoders only" in capsys.readouterr().err


def test_devices_get_a_row_for_every_way_to_share(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama-3-8B, 4.6 GB of 4-bit layers and embeddings: whole on no card of 6 GiB, shared on two of them."""
    out = told([LLAMA, "--devices", "2", "--vram", "6GiB", "--ram", "64GiB", "--context", "1k", "--json"], capsys)
    rows = json.loads(out)
    assert [(row["shard"], row["sequence"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert rows[0]["accelerator"] > rows[2]["accelerator"]
    assert rows[0]["sent a step"] < rows[2]["sent a step"] < rows[3]["sent a step"]
    assert rows[3]["paste"] == "--devices 2 --shard 2 --sequence 2"


LARGE = {
    "33B": {
        "hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52,
        "num_key_value_heads": 52, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
}  # fmt: skip


@pytest.mark.parametrize("attention", ["exact", "shifted"])
@pytest.mark.parametrize("size", LARGE)
def test_readmes_rows_of_two_cards_are_what_the_command_prints(
    size: str, attention: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    told_rows = re.findall(
        rf"\| {size}, (\d+) GiB each \| (.+) \| ([\d,]+), {attention} \| (.+) \| .+ \| (.+) \|", readme
    )
    assert told_rows
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LARGE[size]}))
    for card, ways, context, held, sent in told_rows:
        limits = ("--vram", f"{card}GiB", "--ram", "128GiB")
        rows = json.loads(
            told(
                [str(tmp_path), "--devices", "2", *limits, "--max-context", "--attention", attention, "--json"], capsys
            )
        )
        wanted = (int("shard 2" in ways) + 1, int("sequence 2" in ways) + 1)
        (row,) = (row for row in rows if (row["shard"], row["sequence"]) == wanted)
        assert f"{row['with layer inputs in host memory']:,}" == context
        for said, key in ((held, "accelerator"), (sent, "sent a step")):
            size_gib = row[key] / 2**30
            assert said == (f"{size_gib:.0f} GiB" if size_gib >= 100 else f"{size_gib:.1f} GiB")


@pytest.mark.parametrize("ram", ["8GiB", "16GiB", "24GiB", "64GiB"])
def test_what_gives_fewer_tokens_is_not_offered(ram: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(told([LLAMA, "--max-context", "--vram", "24GiB", "--ram", ram, "--json"], capsys))
    tokens = [row["context"] for row in rows]
    assert rows[0]["settings"] == "these settings"
    assert tokens == sorted(set(tokens))
