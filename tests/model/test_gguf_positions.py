"""The positions of a GGUF file are those of its model, or it is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from longfit.errors import ModelError
from longfit.exporting.gguf_families import llama3_factors
from longfit.model.gguf_config import complete_config
from longfit.model.gguf_positions import llama3_of, read_positions


def header(path: Path, architecture: str = "llama", **values: Any) -> Path:
    """A file with metadata and one tensor."""
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](name, value)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> dict[str, Any]:
    config = SimpleNamespace(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, max_position_embeddings=128
    )
    read_positions(path, config)
    return config.rope_parameters


@given(
    factor=st.floats(2, 64), low=st.floats(0.5, 2), span=st.floats(0.5, 8), original=st.sampled_from([32, 4096, 8192]),
    theta=st.sampled_from([1e4, 5e5]), size=st.sampled_from([16, 64, 128]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_settings_of_llama3_are_found_from_its_factors(
    factor: float, low: float, span: float, original: int, theta: float, size: int
) -> None:
    rope = {
        "factor": factor, "low_freq_factor": low, "high_freq_factor": low + span,
        "original_max_position_embeddings": original, "rope_theta": theta,
    }  # fmt: skip
    factors = llama3_factors(rope, size)
    if float(factors.min()) > 1.01 or float(factors.max()) < 0.999 * factor:
        return  # all frequencies on one side: the factors say less than the settings do
    found = llama3_of(factors.double(), theta=theta, name="x")
    again = llama3_factors({**found, "rope_theta": theta}, size)
    assert torch.allclose(again, factors, rtol=2e-4)  # twice what is read as exact


def test_other_factors_are_refused() -> None:
    with pytest.raises(ModelError, match="factors that no llama3 settings make"):
        llama3_of(torch.tensor([1.0, 8.0, 2.0, 4.0, 8.0, 1.0], dtype=torch.float64), theta=10000.0, name="x")
    assert llama3_of(torch.ones(8, dtype=torch.float64), theta=10000.0, name="x") == {}


def test_yarn_and_linear_are_read(tmp_path: Path) -> None:
    scaling = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    found = read(header(tmp_path / "yarn.gguf", **scaling, rope__scaling__original_context_length=32))
    assert found == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32
    }  # fmt: skip
    found = read(header(tmp_path / "linear.gguf", rope__scaling__type="linear", rope__scaling__factor=2.0))
    assert found == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    assert read(header(tmp_path / "none.gguf"))["rope_type"] == "default"


def test_what_is_not_understood_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rope.scaling.type 'spiral': positions that transformers does not have"):
        read(header(tmp_path / "a.gguf", rope__scaling__type="spiral"))
    with pytest.raises(ModelError, match=r"rope\.scaling\.yarn_log_multiplier 0\.1"):
        read(header(tmp_path / "b.gguf", rope__scaling__type="yarn", rope__scaling__yarn_log_multiplier=0.1))


@pytest.mark.parametrize(("layers", "expected"), [(42, 256), (46, 144)], ids=["9b", "27b"])
def test_gemma_divides_its_scores_by_what_llama_cpp_does(layers: int, expected: int, tmp_path: Path) -> None:
    config = SimpleNamespace(
        model_type="gemma2", hidden_size=4608, num_attention_heads=32, num_hidden_layers=layers, head_dim=256,
        query_pre_attn_scalar=256, pad_token_id=None, vocab_size=4,
    )  # fmt: skip
    complete_config(header(tmp_path / "x.gguf", "gemma2"), config)
    assert config.query_pre_attn_scalar == expected
