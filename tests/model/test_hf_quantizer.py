"""Files: bitsandbytes' own keys and bytes out, its checkpoints in, whatever the default dtype is."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from longfit.layers.linear4bit import Linear4bit
from longfit.layers.linear8bit import Linear8bit
from longfit.model.load import load


def bitsandbytes_model(folder: Path, *, double_quant: bool, quant_type: str = "nf4"):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_bitsandbytes_checkpoint_loads_and_is_written_again_byte_for_byte(
    folder: Path, tmp_path: Path, double_quant: bool, quant_type: str
) -> None:
    theirs = bitsandbytes_model(folder, double_quant=double_quant, quant_type=quant_type)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "theirs" / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    torch.set_default_dtype(torch.bfloat16)  # must not round the offset of the double quantisation
    ours, _ = load(tmp_path / "theirs", dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    assert sum(isinstance(module, Linear4bit) for module in ours.modules()) == 14
    ours.save_pretrained(tmp_path / "ours")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert list(written) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(written[key], tensor), key
    blocks = [json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in ("theirs", "ours")]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_what_a_checkpoint_keeps_dense_comes_in_the_dtype_asked_for(quant: str, folder: Path, tmp_path: Path) -> None:
    load(folder, quant=quant, dtype=torch.bfloat16)[0].save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model, _ = load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}


def test_bitsandbytes_loads_what_longfit_saved(folder: Path, tmp_path: Path) -> None:
    """Weights agree to the last bit, as bitsandbytes de-quantises them itself."""
    from bitsandbytes.functional import dequantize_4bit

    ours, _ = load(folder)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, module in ours.named_modules():
        if isinstance(module, Linear4bit) and module.in_features % 64 == 0:  # elsewhere its CPU kernel is wrong
            weight = theirs.get_submodule(name).weight
            assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), module.dequantize()), name


def test_int4_files_are_longfit_s_own_and_refused_for_now(folder: Path, tmp_path: Path) -> None:
    ours, _ = load(folder, quant="int4")
    with pytest.raises(ValueError, match="not serializable"):
        ours.save_pretrained(tmp_path)


def test_an_eval_forward_changes_no_byte_of_what_is_saved(folder: Path) -> None:
    model, _ = load(folder)

    def digest() -> str:
        parts = (tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in model.state_dict().values())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    before = digest()
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(9)[None])
    assert digest() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_8_bit_checkpoint_of_bitsandbytes_loads_and_is_written_again(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / name).write_bytes((folder / name).read_bytes())
    ours, _ = load(tmp_path / "theirs", dtype=dtype)
    assert sum(isinstance(module, Linear8bit) for module in ours.modules()) == 14
    ours.save_pretrained(tmp_path / "ours")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(written[key], tensor), key
    blocks = [json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in ("theirs", "ours")]
    assert all(blocks[1][key] == blocks[0][key] for key in ("load_in_8bit", "load_in_4bit", "quant_method"))


def test_bitsandbytes_loads_the_8_bit_model_that_longfit_saved(folder: Path, tmp_path: Path) -> None:
    ours, _ = load(folder, quant="int8", dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = [(name, module) for name, module in ours.named_modules() if isinstance(module, Linear8bit)]
    assert layers
    for name, module in layers:
        codes, absmax = module.codes_and_absmax()
        weight = theirs.get_submodule(name).weight
        assert torch.equal(weight.data, codes), name
        assert torch.equal(weight.SCB, absmax), name
