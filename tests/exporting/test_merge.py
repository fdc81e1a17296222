"""A merged model is the trained one, in plain transformers; nothing of it is lost, nothing half-made is left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.exporting.conftest import MakeRun
from tests.model_folders import byte_tokenizer, llama, save_model
from tests.stored_folders import save_stored

from benchmarks import merge_memory
from longfit.errors import ExportError, LongfitError, ModelError
from longfit.exporting import merge_plan
from longfit.exporting.merge import merge
from longfit.exporting.trained import open_trained
from longfit.files import checksums
from longfit.model.save import save_adapter

IDS = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(2))
TERMS, DEPTH = 128, 20  # longest sum (keys, MLP inputs), and matmuls and norms that follow one another

PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, ids, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, logits)
assert not any(name.split(".")[0] in ("longfit", "peft") for name in sys.modules)
"""


def plain_logits(folder: Path, tmp_path: Path) -> torch.Tensor:
    """Of the merged folder, in a process that knows nothing of longfit or PEFT."""
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = [str(folder.resolve()), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    result = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "logits.pt")


def read_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def trained_logits(run: Path, **options) -> torch.Tensor:
    model, _ = open_trained(run, **options).load(torch.device("cpu"))
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_equal_up_to_rounding(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Both compute in float32, in another order: a sum of n terms moves by at most n u of its absolute sum, u = 2^-24;
    DEPTH such sums follow one another."""
    assert (got - expected).abs().max() <= TERMS * DEPTH * 2.0**-24 * expected.abs().max()


def test_onto_4bit_plain_transformers_has_the_trained_model(run: Path, tmp_path: Path) -> None:
    result = merge(run, tmp_path / "merged", onto="4bit", measure=False)
    assert result.tied == "output head and embeddings are tied, as in the base"
    assert_equal_up_to_rounding(plain_logits(tmp_path / "merged", tmp_path), trained_logits(run))
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_the_folder_has_everything_a_server_needs(run: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "merged", measure=False)
    config = read_config(tmp_path / "merged")
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["max_position_embeddings"] == 128
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 257


def test_the_chat_template_and_its_end_token_come_along(make_run: MakeRun, tmp_path: Path) -> None:
    trained = make_run(train__steps=1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    for folder in ("adapter", "best"):  # the best is merged where there is one
        tokenizer.save_pretrained(trained / folder)
        (trained / folder / checksums.NAME).unlink(missing_ok=True)  # of what was there before
    (trained.parent / "model" / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    merge(trained, tmp_path / "merged", measure=False)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [3, 4, 257]


def test_auto_takes_the_merge_that_drifts_less(run: Path, tmp_path: Path) -> None:
    result = merge(run, tmp_path / "merged")
    rows = {row.name: row for row in result.drift}
    assert list(rows) == [
        "as trained: adapter on the 4-bit base", "the 4-bit base without the adapter", "merged onto 16bit",
        "merged onto 4bit",
    ]  # fmt: skip
    assert result.onto == "4bit"
    assert result.reason.startswith("it drifts less")
    assert (result.drift[0].kl, result.drift[0].same_greedy) == (0, 1)
    assert rows["merged onto 4bit"].kl < 1e-6 < rows["merged onto 16bit"].kl < result.drift[1].kl
    assert result.proof.kl <= result.proof.bound < 1e-5
    assert result.text.endswith("held-out.txt, computed in float32")
    assert not result.warnings


def test_onto_16bit_adds_to_the_original_weights(run: Path, tmp_path: Path) -> None:
    result = merge(run, tmp_path / "merged", onto="16bit")
    assert result.reason == "asked for, although onto 4bit drifts less"
    name = "model.layers.1.mlp.up_proj"
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    original = load_file(run.parent / "model" / "model.safetensors")[f"{name}.weight"]
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    A, B = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert torch.equal(merged, original.clone().addmm_(B, A, alpha=32 / 4))


def test_an_adapter_on_a_tied_head_unties_it_and_says_so(tmp_path: Path) -> None:
    """PEFT leaves the embeddings as they were; written as one tensor, one of the two would be wrong."""
    save_model(tmp_path / "base", tied=True, dtype=torch.float32)
    model = get_peft_model(llama(tied=True, dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save_adapter(model, byte_tokenizer(), tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    result = merge(tmp_path / "adapter", tmp_path / "merged", onto="16bit", dtype="float32", measure=False)
    assert result.tied.startswith("untied: lm_head.weight was trained apart from the embeddings")
    assert read_config(tmp_path / "merged")["tie_word_embeddings"] is False
    assert_equal_up_to_rounding(plain_logits(tmp_path / "merged", tmp_path), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3}},
        {"trainable_token_indices": [3, 200]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_lora_are_merged_as_peft_does(options: dict[str, object], tmp_path: Path) -> None:
    save_model(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(
        llama(dtype=torch.float32), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save_adapter(model, byte_tokenizer(), tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    merge(tmp_path / "adapter", tmp_path / "merged", onto="16bit", dtype="float32", measure=False)
    assert_equal_up_to_rounding(plain_logits(tmp_path / "merged", tmp_path), expected)


def test_what_cannot_be_merged_is_named(run: Path, tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    model.peft_config["default"].base_model_name_or_path = str(run.parent / "model")
    save_adapter(model, byte_tokenizer(), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"tensors that longfit cannot merge, first .*lora_B\.bias"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LOHA"}))
    with pytest.raises(ModelError, match="peft_type='LOHA': longfit merges LoRA"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": "pissa"}))
    with pytest.raises(ModelError, match=r"init_lora_weights='pissa' .the base that it changed is in no file"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ExportError, match="neither a run"):
        merge(tmp_path, tmp_path / "merged")
    with pytest.raises(LongfitError, match=r"no checkpoint 'step-9'; there are best, last, step-000004"):
        merge(run, tmp_path / "merged", checkpoint="step-9")
    with pytest.raises(ExportError, match="must be one of auto, 16bit, 4bit"):
        merge(run, tmp_path / "merged", onto="8bit")
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", tied=True, intermediate_size=64)
    with pytest.raises(ExportError, match="this is another base"):
        merge(run, tmp_path / "merged", base=str(other))
    with pytest.raises(ExportError, match="not there any more; say where it is with --base"):
        merge(run, tmp_path / "merged", base=str(tmp_path / "gone"))


def test_a_base_that_was_never_quantised_has_one_merge(make_run: MakeRun, tmp_path: Path) -> None:
    dense = make_run(model__dtype=torch.bfloat16, **{"model.quant": "none"})
    with pytest.raises(ExportError, match="was not quantised; use --onto 16bit"):
        merge(dense, tmp_path / "merged", onto="4bit")
    result = merge(dense, tmp_path / "merged", dtype="bfloat16")
    assert (result.onto, result.reason) == ("16bit", "the base was not quantised while training")
    assert [row.name for row in result.drift][-1] == "merged onto 16bit"


@pytest.mark.parametrize(
    "quant",
    [{"model.quant": "int8"}, {"model.int8_modules": ["model.layers.0.mlp.up_proj"]}],
    ids=lambda q: next(iter(q)),
)
def test_a_base_in_8_bits_is_merged_as_it_was_trained(
    quant: dict[str, object], make_run: MakeRun, tmp_path: Path
) -> None:
    trained = make_run(train__steps=2, **quant)
    merge(trained, tmp_path / "merged", onto="4bit", measure=False)
    assert_equal_up_to_rounding(plain_logits(tmp_path / "merged", tmp_path), trained_logits(trained))


def test_a_bitsandbytes_checkpoint_has_no_originals(make_run: MakeRun, tmp_path: Path) -> None:
    from longfit.model.load import load

    save_model(tmp_path / "dense")
    model, tokenizer = load(tmp_path / "dense")
    model.save_pretrained(tmp_path / "bnb")
    tokenizer.save_pretrained(tmp_path / "bnb")
    trained = make_run(**{"model.name": str(tmp_path / "bnb")})
    with pytest.raises(ExportError, match="the base is a 4-bit checkpoint: there are no 16-bit originals"):
        merge(trained, tmp_path / "merged", onto="16bit")
    result = merge(trained, tmp_path / "merged")
    assert result.onto == "4bit"
    # The same weights in float32: what is left is the rounding of log-probabilities, here below 16, to 2^-24 of each.
    assert result.drift[-1].kl < 2 * 16 * 2.0**-24
    model, _ = open_trained(trained).load(torch.device("cpu"))
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(merged, layer.get_base_layer().dequantize(torch.float32).addmm_(B, A, alpha=32 / 4))


@pytest.mark.parametrize("base", ["dense", "bitsandbytes"])
def test_a_base_in_a_finer_dtype_than_the_runs_is_what_the_run_made_of_it(
    base: str, make_run: MakeRun, tmp_path: Path
) -> None:
    """The run rounded float32 to bfloat16, embeddings too, and quantised that; so do the merge and what measures it."""
    from longfit.model.load import load

    settings: dict[str, object] = {"model.dtype": "bfloat16", "model__dtype": torch.float32}
    if base == "bitsandbytes":
        save_model(tmp_path / "dense", dtype=torch.float32)
        model, tokenizer = load(tmp_path / "dense", dtype=torch.float32)
        model.save_pretrained(tmp_path / "bnb")
        tokenizer.save_pretrained(tmp_path / "bnb")
        settings["model.name"] = str(tmp_path / "bnb")
    trained = make_run(**settings)
    result = merge(trained, tmp_path / "merged", onto="4bit", dtype="float32")
    # The same weights in float32: what is left is the rounding of log-probabilities, here below 16, to 2^-24 of each.
    assert result.drift[-1].kl < 2 * 16 * 2.0**-24
    model, _ = open_trained(trained).load(torch.device("cpu"))
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    A, B = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    in_run = layer.get_base_layer().dequantize(torch.float32)
    assert torch.equal(merged[f"{name}.weight"], in_run.addmm_(B, A, alpha=32 / 4))
    embeddings = model.get_base_model().get_input_embeddings().weight
    assert torch.equal(merged["model.embed_tokens.weight"], embeddings.float())


@pytest.mark.parametrize("onto", ["4bit", "16bit"])
def test_a_base_in_a_foreign_format_is_merged_dequantised(make_run: MakeRun, tmp_path: Path, onto: str) -> None:
    save_stored(tmp_path / "bases", llama(dtype=torch.float32, intermediate_size=160), "fp8")
    for name in ("stored", "dense"):
        byte_tokenizer().save_pretrained(tmp_path / "bases" / name)
    run = make_run(**{"model.name": str(tmp_path / "bases" / "stored")})
    merge(run, tmp_path / "merged", onto=onto, measure=False)
    assert "quantization_config" not in read_config(tmp_path / "merged")
    if onto == "4bit":
        assert_equal_up_to_rounding(plain_logits(tmp_path / "merged", tmp_path), trained_logits(run))
        return
    merge(run, tmp_path / "other", base=str(tmp_path / "bases" / "dense"), onto=onto, measure=False)
    merged, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "other"))
    assert all(torch.equal(merged[name], other[name]) for name in other)


def test_a_model_of_many_files_is_read_and_written(run: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "one", onto="4bit", measure=False)
    result = merge(run, tmp_path / "many", onto="4bit", measure=False, max_shard_bytes=50_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.num_bytes
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    assert torch.equal(plain_logits(tmp_path / "many", tmp_path), plain_logits(tmp_path / "one", tmp_path))


def test_what_exists_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="already exists and is not overwritten"):
        merge(run, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_a_disk_that_is_or_becomes_full(run: Path, tmp_path: Path, monkeypatch) -> None:
    import errno
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ExportError, match=r"needs .* of disk, below 0.1 MiB are free"):
        merge(run, tmp_path / "merged")
    monkeypatch.undo()

    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(merge_plan, "write_model_files", full)
    with pytest.raises(ExportError, match=r"the disk is full .*; nothing was left there"):
        merge(run, tmp_path / "merged", measure=False)
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
from longfit.exporting import merge_plan as planned
from longfit.exporting import merge as merging

whole = planned.write_model_files
planned.write_model_files = lambda *a, **k: (whole(*a, **k), print("written", flush=True), time.sleep(60))
merging.merge(sys.argv[1], sys.argv[2], measure=False)
"""


def test_killed_it_leaves_nothing_that_is_taken_for_a_result(run: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED, str(run), str(tmp_path / "merged")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".merged.unfinished"]
    merge(run, tmp_path / "merged", measure=False)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("kind", merge_memory.KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_memory_is_that_of_two_matrices(kind: str, tied: bool, tmp_path: Path) -> None:
    """A model of 76 MB in files of 30: what is held beyond the start is two of its largest matrices, not the model.

    Mapped pages of the base count as resident but are the system's to drop, so anonymous memory is what is measured.
    """
    if not Path("/proc/self/status").is_file():
        pytest.skip("RssAnon is Linux's")
    shape = {"vocab_size": 258, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    adapter = merge_memory.save_adapted(tmp_path, shape, tied=tied, shard_bytes=30_000_000)
    found = merge_memory.measure(adapter, kind, tmp_path / "out", shard_bytes=30_000_000)
    assert found.num_files == 3
    assert found.two_matrices_bytes == 2 * 2048 * 1024 * 4
    assert found.held_bytes <= found.two_matrices_bytes + merge_memory.SLACK_BYTES < found.model_bytes / 3


def test_the_command_prints_the_table(run: Path, tmp_path: Path, capsys) -> None:
    from longfit.cli.app import main

    assert main(["merge", str(run), "--out", str(tmp_path / "merged"), "--tokens", "128"]) == 0
    out = capsys.readouterr().out
    assert "KL to the trained model" in out
    assert "merged onto the 4bit base (it drifts less" in out
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 2
