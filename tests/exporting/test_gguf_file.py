"""A GGUF file holds the merged model and its tokenizer: for llama.cpp itself, and read back by longfit."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from tests.exporting import adapted
from tests.exporting.adapted import FAMILIES, RULES, TEXT, byte_level, save_adapted, sentencepiece
from tests.exporting.llama_cpp import ROUNDING, LlamaCpp, assert_as_rounded, distance
from tests.model_folders import byte_tokenizer
from tokenizers import Regex, pre_tokenizers

from longfit.cli.app import main
from longfit.errors import ExportError
from longfit.exporting import gguf_file
from longfit.exporting.export import export
from longfit.exporting.gguf_families import FAMILIES as KNOWN
from longfit.exporting.gguf_families import GgufField, llama3_factors
from longfit.exporting.gguf_file import encode, rounding_bound
from longfit.exporting.gguf_tokenizer import pre_name, require_rule
from longfit.exporting.ollama import modelfile
from longfit.model.load import load


def ids_of(tokenizer: Any, text: str = TEXT) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_merged_model(family: str, tmp_path: Path) -> None:
    model, tokenizer = save_adapted(tmp_path, family)
    result = export(tmp_path / "adapter", tmp_path / "out", type="F16", onto="16bit", measure=False)
    theirs = LlamaCpp(tmp_path / "out" / result.files[0], context=128)
    assert theirs.tokenize(TEXT, special=False) == ids_of(tokenizer)
    ids = (3 * ids_of(tokenizer))[:120]
    assert len(ids) > 64  # beyond the native context of the extended ones, and beyond a sliding window
    found, expected = theirs.logits(ids), logits_of(model, ids)
    with model.disable_adapter():
        assert distance(logits_of(model, ids), expected) > 0.1  # so that a lost adapter would show
    assert_as_rounded(found, expected, "F16", model.config.num_hidden_layers)
    theirs.close()
    read_back, _ = load(tmp_path / "out" / result.files[0], quant="none", dtype=torch.float32)
    assert_as_rounded(logits_of(read_back, ids), expected, "F16", model.config.num_hidden_layers)


@pytest.mark.parametrize("file_type", ROUNDING)
def test_every_type_in_llama_cpp_and_read_back(file_type: str, tmp_path: Path) -> None:
    """llama.cpp computes what the file holds; the file holds the merged model up to its type (checked on export)."""
    _, tokenizer = save_adapted(tmp_path, "llama, yarn")
    result = export(tmp_path / "adapter", tmp_path / "out", type=file_type, onto="16bit", measure=False)
    path = tmp_path / "out" / result.files[0]
    ids = (3 * ids_of(tokenizer))[:120]
    read_back, _ = load(path, quant="none", dtype=torch.float32)
    theirs = LlamaCpp(path, context=128)
    assert_as_rounded(theirs.logits(ids), logits_of(read_back, ids), file_type, 2)
    theirs.close()


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 7}}], ids=str)
def test_an_adapter_in_llama_cpp(lora: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer = save_adapted(tmp_path, "llama", **lora)
    export(tmp_path / "adapter", tmp_path / "lora", format="gguf-lora")
    with model.disable_adapter():
        base = tmp_path / "untrained"
        other = save_untrained(tmp_path)
        result = export(other, base, type="F16", onto="16bit", measure=False)
    theirs = LlamaCpp(base / result.files[0], lora=tmp_path / "lora" / "adapter-lora.gguf", context=128)
    ids = ids_of(tokenizer)
    assert_as_rounded(theirs.logits(ids), logits_of(model, ids), "F16", 2)
    theirs.close()


def save_untrained(tmp_path: Path) -> Path:
    """The same base, with an adapter that does nothing."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "nothing"
    folder.mkdir()
    for path in (tmp_path / "adapter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(zeros, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", RULES)
def test_llama_cpp_makes_the_same_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(*RULES[name], ignore_merges=name in ("llama-bpe", "tekken"))
    assert pre_name(json.loads(tokenizer.backend_tokenizer.to_str())) == name
    save_adapted(tmp_path, "llama", tokenizer=tokenizer)
    result = export(tmp_path / "adapter", tmp_path / "out", type="F16", onto="16bit", measure=False)
    theirs = LlamaCpp(tmp_path / "out" / result.files[0], context=128)
    for text in (TEXT, "  two spaces", "12345678", "a\n\n\nb", "</s>x<|end|>", "aBCd HTTPServer ./a/b/\n"):
        assert theirs.tokenize(text) == ids_of(tokenizer, text), text
    theirs.close()


def test_llama_cpp_makes_the_same_tokens_of_sentencepiece(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    save_adapted(tmp_path, "mistral", tokenizer=tokenizer)
    result = export(tmp_path / "adapter", tmp_path / "out", type="F16", onto="16bit", measure=False)
    theirs = LlamaCpp(tmp_path / "out" / result.files[0], context=128)
    for text in ("the year we said", "return this", "日本", "a  b", "zz"):
        assert theirs.tokenize(text) == ids_of(tokenizer, text), text
    assert theirs.ends(tokenizer.eos_token_id)
    theirs.close()


def test_a_rule_without_a_name_is_refused_before_any_work(tmp_path: Path) -> None:
    tokenizer = byte_level(pre_tokenizers.Split(Regex("[a-z]+"), "isolated"), RULES["qwen2"][1])
    save_adapted(tmp_path, "llama", tokenizer=tokenizer)
    with pytest.raises(ExportError, match=r"splits texts by .*\[a-z\]"):
        export(tmp_path / "adapter", tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_merges_is_refused_before_any_work(tmp_path: Path, capsys) -> None:
    save_adapted(tmp_path, "llama", tokenizer=byte_tokenizer())
    words = ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "without a single merge, one token a byte" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--format", "gguf-lora", "--no-measure"]) == 0


def test_a_rule_that_llama_cpp_would_not_apply_is_refused() -> None:
    fields = {"tokenizer.ggml.pre": GgufField("gpt-2", gguf.GGUFValueType.STRING)}
    with pytest.raises(ExportError, match=r"the rule 'gpt-2', but .* those of all qwen2 models by 'qwen2'"):
        require_rule(KNOWN["qwen2"], fields)
    require_rule(KNOWN["llama"], fields)


def test_the_end_of_a_turn_stops_llama_cpp(tmp_path: Path) -> None:
    tokenizer = adapted.gpt2_rule()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}[assistant]"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "[assistant]", "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    save_adapted(tmp_path, "llama", tokenizer=tokenizer)
    result = export(tmp_path / "adapter", tmp_path / "out", type="Q8_0", onto="16bit", measure=False, ollama=True)
    theirs = LlamaCpp(tmp_path / "out" / result.files[0], context=128)
    assert theirs.chat_template() == tokenizer.chat_template
    assert theirs.ends(tokenizer.convert_tokens_to_ids("<|end|>"))
    assert theirs.ends(tokenizer.eos_token_id)
    theirs.close()
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./adapter-Q8_0.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|end|>"\nPARAMETER stop "</s>"\nPARAMETER num_ctx 128\n' in text


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0])
@pytest.mark.parametrize("size", [1e-6, 1.0, 300.0])
def test_no_value_is_off_by_more_than_its_type_rounds(kind: Type, size: float) -> None:
    torch.manual_seed(0)
    values = size * torch.randn(40, 256)
    values[0] = 0
    values[1, 5] = values[1].abs().max() * 3  # the largest of a block, positive: the worst case of Q4_0
    found = torch.from_numpy(gguf.dequantize(encode(values, kind), kind).astype(np.float32)).reshape(values.shape)
    error, bound = (found - values).abs(), rounding_bound(values, kind)
    assert bool((error <= bound).all())
    if kind != Type.F32:
        assert float((error / bound.clamp(min=2.0**-149)).max()) > 0.5  # and the bound is not a loose one


def test_a_file_that_does_not_hold_the_model_is_no_result(tmp_path: Path, monkeypatch) -> None:
    save_adapted(tmp_path, "llama")
    right = gguf_file.encode
    monkeypatch.setattr(gguf_file, "encode", lambda tensor, kind: right(tensor.flip(0), kind))
    with pytest.raises(ExportError, match=r"is off by .* rounds by .* at most; the file is not what was trained"):
        export(tmp_path / "adapter", tmp_path / "out", type="F16", onto="16bit", measure=False)
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_what_llama_cpp_computes_in_another_way_is_refused(tmp_path: Path) -> None:
    save_adapted(tmp_path, "gemma2")
    path = tmp_path / "adapter" / "config.json"
    config = json.loads(path.read_text())
    wrong = {
        r"query_pre_attn_scalar is 9": {"query_pre_attn_scalar": 9},
        r"hidden_activation is 'silu'": {"hidden_activation": "silu"},
        r"layer_types: every layer but each 2th": {"layer_types": ["full_attention"] * 2},
        r"soft caps are switched off": {"attn_logit_softcapping": None},
    }
    for message, change in wrong.items():
        path.write_text(json.dumps(config | change))
        with pytest.raises(ExportError, match=message):
            export(tmp_path / "adapter", tmp_path / "out", measure=False)
    path.write_text(json.dumps({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}))
    with pytest.raises(ExportError, match="longfit writes GGUF for llama, mistral, qwen2"):
        export(tmp_path / "adapter", tmp_path / "lora", format="gguf-lora")
    with pytest.raises(ExportError, match="must be one of F16, BF16, Q8_0, Q4_0"):
        export(tmp_path / "adapter", tmp_path / "out", type="Q4_K_M")
    with pytest.raises(ExportError, match="must be one of gguf, gguf-lora, safetensors, bnb-4bit"):
        export(tmp_path / "adapter", tmp_path / "out", format="onnx")


def test_norms_trained_whole_have_no_place_in_an_adapter_file(tmp_path: Path) -> None:
    save_adapted(tmp_path, "llama", modules_to_save=["input_layernorm"])
    with pytest.raises(ExportError, match=r"no place for them. Merge it: longfit export .* --format gguf"):
        export(tmp_path / "adapter", tmp_path / "out", format="gguf-lora")


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {**adapted.LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    scaled, plain = (
        LlamaRotaryEmbedding(LlamaConfig(head_dim=128, rope_parameters=parameters)).inv_freq
        for parameters in (rope, {"rope_type": "default", "rope_theta": 500000.0})
    )
    assert torch.allclose(plain / scaled, llama3_factors(rope, 128), rtol=1e-5)  # float32 powers: some units of 2^-24


def test_the_modelfile_of_a_template_that_parts_do_not_explain() -> None:
    tokenizer = adapted.gpt2_rule()
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    text, warnings = modelfile("x.gguf", tokenizer, context=64)
    assert "TEMPLATE" not in text
    assert "does more than put text around messages" in warnings[0]


@pytest.mark.model
def test_metadata_of_a_gguf_base_are_carried_over(demo_gguf: Path) -> None:
    carried = gguf_file.carried_metadata(demo_gguf, KNOWN["llama"])
    original = GGUFReader(str(demo_gguf))
    for key, field in carried.items():
        assert field.value == original.fields[key].contents(), key
    assert carried["tokenizer.ggml.pre"].value == "smollm"
    assert not any(key.startswith("GGUF.") or key == "general.file_type" for key in carried)
