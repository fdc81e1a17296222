"""What is saved loads in plain transformers and PEFT, and loads back bit by bit; other positions are refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model_folders import llama

from longfit.errors import ModelError
from longfit.files.checksums import seal_folder
from longfit.model.adapters import add_adapters
from longfit.model.context import extend_context
from longfit.model.load import load
from longfit.model.save import load_adapter, save_adapter
from longfit.model.weight_files import ADAPTER

NATIVE = 64
CONTEXT = 4 * NATIVE
IDS = torch.randint(0, 256, (1, CONTEXT), generator=torch.Generator().manual_seed(2))

PLAIN = """
import sys
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

base, folder, ids, logits = sys.argv[1:]
config = AutoConfig.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, logits)
assert not any(name.split(".")[0] == "longfit" for name in sys.modules), "longfit was imported"
"""


def randomise(model: torch.nn.Module) -> None:
    """Give everything trained a value of its own: an untouched B is zero and would hide a lost adapter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("train_whole", [False, True])
def test_plain_transformers_and_peft_give_the_same_logits(folder: Path, tmp_path: Path, train_whole: bool) -> None:
    """Both compute in float32; only the order of their sums differs, above all in attention.

    A sum of n terms in another order moves by at most n u of its absolute sum, u = 2^-24. The longest sums have n = 256
    (keys); about 20 matmuls and norms follow one another: 256 * 20 * 2^-24 = 3e-4 of the largest logit.
    """
    model, tokenizer = load(folder, quant="none", dtype=torch.float32)
    extend_context(model, tokenizer, context=CONTEXT)
    untrained = logits_of(model)
    adapted = add_adapters(model, rank=4, train_embeddings=train_whole, train_norms=train_whole)
    randomise(adapted)
    expected = logits_of(adapted)
    save_adapter(adapted, tokenizer, tmp_path / "adapter")
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = [folder, tmp_path / "adapter", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    result = subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    got = torch.load(tmp_path / "logits.pt")
    tolerance = CONTEXT * 20 * 2.0**-24 * expected.abs().max().item()
    assert (got - expected).abs().max().item() <= tolerance
    assert (untrained - expected).abs().max().item() > 100 * tolerance  # so that a lost adapter would show


def test_an_nf4_model_with_its_adapter_loads_back_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder, quant="nf4")
    extend_context(model, tokenizer, context=CONTEXT)
    adapted = add_adapters(model, rank=4, train_norms=True, train_embeddings=True)
    randomise(adapted)
    expected = logits_of(adapted)
    save_adapter(adapted, tokenizer, tmp_path / "adapter")

    fresh, _ = load(folder, quant="nf4")
    extend_context(fresh, context=CONTEXT)
    untrained = logits_of(fresh)
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits_of(loaded), expected)
    assert not torch.equal(untrained, expected)


def test_a_model_at_other_positions_is_refused(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder, quant="nf4")
    extend_context(model, tokenizer, context=CONTEXT)
    save_adapter(add_adapters(model), tokenizer, tmp_path / "adapter")

    fresh, _ = load(folder, quant="nf4")
    with pytest.raises(ModelError, match=r"trained with rope_parameters = .*yarn.*extend the model's context"):
        load_adapter(fresh, tmp_path / "adapter")
    extend_context(fresh, context=CONTEXT, rope="linear")
    with pytest.raises(ModelError, match="trained with rope_parameters"):
        load_adapter(fresh, tmp_path / "adapter")


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter; pass the model that add_adapters returned"):
        save_adapter(llama(), None, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_adapter(llama(), tmp_path)


def test_a_damaged_adapter_is_named(folder: Path, tmp_path: Path) -> None:
    """Tied embeddings and norms trained too: every kind of tensor that an adapter file holds."""
    model, tokenizer = load(folder, quant="none", dtype=torch.float32)
    saved = save_adapter(
        add_adapters(model, rank=4, train_embeddings=True, train_norms=True), tokenizer, tmp_path / "a"
    )
    whole = load_file(saved / ADAPTER)
    load_adapter(load(folder, quant="none", dtype=torch.float32)[0], saved)
    some = next(name for name in whole if "lora_A" in name)
    wrong = {
        "lacks": {name: tensor for name, tensor in whole.items() if name != some},
        "has what this model has not": whole | {f"{some}.more": torch.zeros(2)},
        "holds NaN or infinity": whole | {some: whole[some] * float("inf")},
        "size mismatch": whole | {some: torch.zeros(3, 3)},
    }
    for told, tensors in wrong.items():
        save_file(tensors, saved / ADAPTER)
        with pytest.raises(ModelError, match=told) as caught:
            load_adapter(load(folder, quant="none", dtype=torch.float32)[0], saved)
        assert str(saved) in str(caught.value)
    (saved / ADAPTER).write_bytes(b"cut")
    with pytest.raises(ModelError, match="not a safetensors file, or cut short"):
        load_adapter(load(folder, quant="none", dtype=torch.float32)[0], saved)
    (saved / ADAPTER).rename(saved / "adapter_model.bin")
    with pytest.raises(ModelError, match="no pickled adapters"):
        load_adapter(load(folder, quant="none", dtype=torch.float32)[0], saved)


def test_a_sealed_adapter_that_was_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder, quant="none", dtype=torch.float32)
    saved = save_adapter(add_adapters(model, rank=4), tokenizer, tmp_path / "adapter")
    seal_folder(saved)
    (saved / "README.md").write_text("a card of my own")
    load_adapter(load(folder, quant="none", dtype=torch.float32)[0], saved)
    path = saved / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 32', '"lora_alpha": 33'))
    with pytest.raises(ModelError, match=r"adapter_config\.json is damaged"):
        load_adapter(load(folder, quant="none", dtype=torch.float32)[0], saved)
