"""A run for other programs: measured beside the trained model; bitsandbytes' format opens in bitsandbytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.evaluation.finished_run import prose
from tests.exporting.adapted import gpt2_rule
from tests.exporting.conftest import MakeRun
from tests.exporting.llama_cpp import LlamaCpp, assert_as_rounded

from longfit.cli.app import main
from longfit.errors import ExportError
from longfit.exporting.export import export
from longfit.exporting.trained import open_trained
from longfit.model.load import load

BITSANDBYTES = """
import sys
import torch
from transformers import AutoModelForCausalLM

folder, ids, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, logits)
assert not any(name.split(".")[0] == "longfit" for name in sys.modules)
"""


def test_bnb_4bit_opens_in_transformers_with_bitsandbytes(make_run: MakeRun, tmp_path: Path) -> None:
    """Inner sizes are whole blocks: with others bitsandbytes itself fails on a CPU (its issue of AVX512 rows)."""
    pytest.importorskip("bitsandbytes")
    trained = make_run(model__intermediate_size=128, model__num_key_value_heads=4)
    result = export(trained, tmp_path / "out", format="bnb-4bit")
    assert result.files == ("model.safetensors",)
    assert result.drift[-1].kl < result.drift[1].kl
    assert result.proof.kl <= result.proof.bound
    assert result.text.endswith("computed in float32")
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(2))
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(tmp_path / "out"), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", BITSANDBYTES, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, _ = load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    # The same bytes; but on a CPU bitsandbytes may repack them with block constants in bfloat16 and multiply in it: 8
    # bits that are rounded in about 20 places, one after the other.
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() <= 20 * 2.0**-8 * expected.abs().max()


def test_safetensors_is_a_merge(run: Path, tmp_path: Path) -> None:
    result = export(run, tmp_path / "out", format="safetensors", measure=False)
    assert result.onto == "16bit"
    assert "model.embed_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_gguf_file_is_measured_beside_the_trained_model(make_run: MakeRun, tmp_path: Path, capsys) -> None:
    trained = make_run(model__vocab_size=340, tokenizer=gpt2_rule(), context__context=64)
    assert main(["export", str(trained), "--out", str(tmp_path / "out"), "--type", "Q8_0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    trained, base, exported = (row["kl"] for row in result["drift"])
    assert trained == 0 < exported < base
    assert result["proof"]["kl"] <= result["proof"]["bound"]
    assert result["files"] == ["run-Q8_0.gguf"]
    assert result["onto"] == "4bit"


def test_what_does_not_go_together(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a Modelfile goes with --format gguf"):
        export(run, tmp_path / "out", format="bnb-4bit", ollama=True)
    with pytest.raises(ExportError, match="no place for them"):
        export(run, tmp_path / "out", format="gguf-lora")
    assert not list(tmp_path.iterdir())


def test_a_dtype_and_settings_of_the_text_act(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "held.csv").write_text("body,id\n" + f'"{prose(200)}",1\n')
    words = [str(run), "--format", "safetensors", "--text", str(tmp_path / "held.csv"), "--tokens", "128"]
    words += ["--dtype", "bfloat16", "--onto", "4bit"]
    assert main(["export", *words, "--out", str(tmp_path / "a")]) == 2
    assert "data.text_column=body" in capsys.readouterr().err
    assert main(["export", *words, "--out", str(tmp_path / "b"), "data.text_column=body"]) == 0
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    capsys.readouterr()
    assert main(["export", *words, "--out", str(tmp_path / "c"), "model.quant=none"]) == 2
    assert "model.quant: is what the run was trained with" in capsys.readouterr().err
    with pytest.raises(ExportError, match="a GGUF file holds is its type; use --type"):
        export(run, tmp_path / "d", dtype="bfloat16")


def test_rows_of_new_tokens_are_in_llama_cpp_too(make_run: MakeRun, tmp_path: Path) -> None:
    """Two role markers that the base lacks: the same tokens, the same logits; no place in an adapter file."""
    tokenizer = gpt2_rule()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<q>", "<a>"])
    trained = make_run(
        model__vocab_size=rows, model__tied=True, tokenizer=tokenizer, context__context=64,
        adapter__train_new_tokens=True,
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"trained 1 tensors whole .* no place for them"):
        export(trained, tmp_path / "lora", format="gguf-lora")
    result = export(trained, tmp_path / "out", type="F16")
    assert result.proof.kl <= result.proof.bound
    text = "<q>who slept in the year 1984<a>said the town<q>"
    ids = tokenizer(text).input_ids
    assert {rows, rows + 1} < set(ids)
    model, _ = open_trained(trained).load(torch.device("cpu"))
    theirs = LlamaCpp(tmp_path / "out" / result.files[0], context=64)
    assert theirs.tokenize(text) == ids
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    assert_as_rounded(theirs.logits(ids), expected, "F16", 2)
    theirs.close()
