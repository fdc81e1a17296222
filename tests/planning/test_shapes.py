"""Shapes: the parameters of real models to the last one, and clear refusals."""

import json
import struct
from pathlib import Path

import pytest
import torch
import transformers
from tests.planning.configs import FOLDER, NAMES, config

from longfit.errors import ModelError
from longfit.files.gguf_header import read_header
from longfit.planning.gguf_config import gguf_config
from longfit.planning.shapes import ModelShape, read_shape


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_windows_are_those_of_the_model(name: str) -> None:
    made = transformers.AutoConfig.for_model(**config(name))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    shape = ModelShape.of(config(name))
    assert shape.num_params == sum(p.numel() for p in model.parameters())
    text = made.get_text_config()
    if getattr(text, "layer_types", None):
        keys = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
        expected = [getattr(text, keys[kind]) if kind in keys else None for kind in text.layer_types]
    else:
        expected = [getattr(text, "sliding_window", None)] * text.num_hidden_layers
    assert list(shape.windows) == expected
    assert shape.native_context == text.max_position_embeddings


def test_a_folder_a_file_and_a_dict_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("Qwen3-8B")))
    shapes = [read_shape(source) for source in (tmp_path, tmp_path / "config.json", config("Qwen3-8B"))]
    assert shapes[0] == shapes[1] == shapes[2] == read_shape(FOLDER / "Qwen3-8B.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "bert"}, "decoders only"),
        ({"model_type": "gpt_bigcode"}, "gpt_bigcode"),
        ({"model_type": None}, "model_type"),
        ({"num_experts": 8}, "mixture of experts"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"hidden_size": -4096}, "at least 1"),
        ({"hidden_size": "4096"}, "whole number"),
        ({"num_key_value_heads": 5}, "multiple"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "head_dim"),
    ],
)
def test_a_configuration_that_cannot_be_planned_is_refused(change: dict[str, object], told: str) -> None:
    values = {key: value for key, value in (config("Llama-2-7B") | change).items() if value is not None}
    with pytest.raises(ModelError, match=told):
        ModelShape.of(values, name="model")


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ModelError, match="the configuration cannot be read"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ModelError, match="JSON object"):
        read_shape(tmp_path)


# ------------------------------------------------------------------------------------------------ GGUF headers
def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def gguf(path: Path, *, architecture: str = "llama", head: bool = False, experts: int = 0) -> Path:
    """Write a header with every kind of value that matters; no tensor data follows."""
    sizes = {
        "embedding_length": 576,
        "feed_forward_length": 1536,
        "block_count": 30,
        "attention.head_count": 9,
        "attention.head_count_kv": 3,
        "context_length": 8192,
        "expert_count": experts,
    }
    keys = [key("general.architecture", 8, text(architecture))]
    keys += [key(f"{architecture}.{name}", 4, struct.pack("<I", value)) for name, value in sizes.items()]
    tokens = b"".join(text(f"token{number}") for number in range(49_152))
    keys += [key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 49_152) + tokens)]
    keys += [key("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 49_152) + bytes(4 * 49_152))]
    keys += [key("a.few", 9, struct.pack("<IQ", 4, 2) + struct.pack("<II", 1, 2)), key("a.flag", 7, b"\1")]
    names = ["token_embd.weight", *(["output.weight"] if head else [])]
    tensors = [text(name) + struct.pack("<IQQIQ", 2, 576, 49_152, 0, 0) for name in names]
    counts = struct.pack("<IQQ", 3, len(tensors), len(keys))
    path.write_bytes(b"GGUF" + counts + b"".join(keys) + b"".join(tensors))
    return path


def test_a_gguf_header_is_a_configuration(tmp_path: Path) -> None:
    shape = read_shape(gguf(tmp_path / "model.gguf"))
    assert shape.num_params == ModelShape.of(config("SmolLM2-135M")).num_params
    assert shape.tied
    assert not read_shape(gguf(tmp_path / "head.gguf", head=True)).tied
    header = read_header(tmp_path / "model.gguf")
    assert header.keys["a.few"] == [1, 2]
    assert header.keys["a.flag"] is True
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {"token_embd.weight": (576, 49_152)}


def test_a_damaged_gguf_header_is_refused(tmp_path: Path) -> None:
    path = gguf(tmp_path / "model.gguf")
    whole = path.read_bytes()
    for length in (3, 10, 40, 500, len(whole) - 5):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.gguf"):
            gguf_config(path)
    with pytest.raises(ModelError, match="mixture of experts"):
        read_shape(gguf(tmp_path / "mixtral.gguf", experts=8))
    with pytest.raises(ModelError, match="architecture 'mamba'"):
        gguf_config(gguf(tmp_path / "mamba.gguf", architecture="mamba"))


def test_a_multimodal_llama_4_is_its_decoder() -> None:
    text = config("Llama-4-Scout")
    assert read_shape({"model_type": "llama4", "text_config": text, "vision_config": {}}) == read_shape(text)
    with pytest.raises(ModelError, match="without 'text_config'"):
        read_shape({"model_type": "llama4"})


def test_layers_of_a_mixture_are_of_two_kinds() -> None:
    sparse, dense = ModelShape.of(config("Qwen3-30B-A3B") | {"mlp_only_layers": [0, 47]}).layer_kinds
    assert (sparse.count, dense.count) == (46, 2)
    assert dense.experts is None
    assert sparse.experts is not None
    assert sparse.experts.rows == 8
    sparse, dense = ModelShape.of(config("Llama-4-Scout") | {"interleave_moe_layer_step": 2}).layer_kinds
    assert (sparse.count, dense.inner) == (24, 16_384)
