"""Loading: tensor by tensor, at the memory promised, with a true account, and clear refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.model_folders import byte_tokenizer, llama, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, ViTConfig

from longfit.errors import ModelError
from longfit.layers.linear4bit import Linear4bit
from longfit.model.load import LoadReport, load, load_report
from longfit.numerics.quant_state import dequantize_4bit, quantize_4bit


def test_every_linear_but_the_head_is_quantised_from_the_dense_weight(folder: Path) -> None:
    model, tokenizer = load(folder, dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    report = load_report(model)
    assert len(report.quantized) == 2 * 7
    assert report.dense == {
        "lm_head": "output head: its error goes into every logit",
        "model.embed_tokens": "embeddings are looked up, not multiplied",
    }
    for name in report.quantized:
        expected = dequantize_4bit(*quantize_4bit(dense.get_submodule(name).weight.detach()))
        assert torch.equal(model.get_submodule(name).dequantize(), expected), name
    bias = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_submodule(bias).bias, dense.get_submodule(bias).bias)
    assert tokenizer("ab").input_ids == tokenizer("ab", add_special_tokens=False).input_ids


def test_the_report_counts_bytes(folder: Path) -> None:
    model, _ = load(folder)
    report = load_report(model)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    constants = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("constants"))
    assert report.total_bytes == sum(parameter.nbytes for parameter in model.parameters()) + constants
    assert report.half_bytes == sum(parameter.nbytes for parameter in dense.parameters())
    assert 4.125 < report.bits_per_param < 4.6  # 4.127, and the shared constants of small layers


def test_the_report_reads_as_a_line_a_reason() -> None:
    dense = {f"layers.{number}.router": "multiplies routing weights" for number in range(5)} | {"lm_head": "the head"}
    report = LoadReport("x", ("a", "b"), dense, quantized_bytes=1_000_000, half_bytes=4_000_000, bits_per_param=4.127)
    assert str(report).splitlines() == [
        "1 MB of weights (4 in 16 bits); 2 layers in 4.13 bits a parameter",
        "not quantised: layers.0.router, layers.1.router, layers.2.router and 2 more: multiplies routing weights",
        "not quantised: lm_head: the head",
    ]
    assert str(LoadReport("x", (), half_bytes=0)) == "0 MB of weights (0 in 16 bits); no layer is quantised"


@pytest.mark.parametrize("quant", ["fp4", "int4", "none"])
def test_other_data_types(folder: Path, quant: str) -> None:
    model, _ = load(folder, quant=quant)
    kinds = {m.row_format.quant_type for m in model.modules() if isinstance(m, Linear4bit)}
    assert kinds == (set() if quant == "none" else {quant})
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_tied_weights_stay_dense_and_tied(tmp_path: Path) -> None:
    save_model(tmp_path, tied=True)
    model, _ = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_report(model).dense["lm_head"] == "shares its weight with the embeddings"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "does not exist, and is no hub id; give a model folder, a .gguf file or a hub id"),
        (lambda p: p, "no config.json in this folder"),
        (lambda p: p / "missing.gguf", "no such file"),
        (lambda p: text_file(p / "fake.gguf"), "magic bytes"),
        (lambda p: image_model_folder(p / "vit"), "not a causal language model"),
        (lambda p: hqq_folder(p / "hqq"), "quantised with 'hqq'"),
    ],
)
def test_what_cannot_be_loaded_is_said(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(make(tmp_path))


def text_file(path: Path) -> Path:
    path.write_text("not a model")
    return path


def image_model_folder(path: Path) -> Path:
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(path)
    return path


def hqq_folder(path: Path) -> Path:
    model = llama()
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    return path


def test_an_unknown_data_type_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="must be one of nf4, fp4, int4, int8 or none"):
        load(folder, quant="nf5")


PEAK = """
import gc, ctypes, sys, threading, time
from longfit.model.load import load, load_report

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

load(sys.argv[1])  # imports and warms everything up
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
before, peak = anonymous_bytes(), 0

def watch():
    global peak
    while True:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.0005)

threading.Thread(target=watch, daemon=True).start()
model, _ = load(sys.argv[2])
report = load_report(model)
print(peak - before, report.total_bytes, report.half_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_peak_memory_is_the_quantised_size_and_two_of_the_largest_tensors(tmp_path: Path, folder: Path) -> None:
    """A dense model of 340 MB, whose embedding (64 MB) is the largest tensor."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=6144,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=32768,
        tie_word_embeddings=True,
    )
    path = tmp_path / "large"
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.tie_weights()
    largest = max(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    del model
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(path)], capture_output=True, text=True, check=True, cwd="src"
    )
    peak, quantised, dense = map(int, result.stdout.split())
    assert peak <= quantised + 2 * largest
    assert peak < 0.9 * dense  # the dense model was never there
