"""Told from its configuration or found by running it: a family packs documents, or does not."""

import pytest
from tests.families.tiny_family import tiny_family

from longfit.attention.hf_attention import attention_key
from longfit.engine.sweep.probe import nature_of
from longfit.model.token_mixing import carries_state


@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "qwen3_moe", "bloom", "qwen3_next", "lfm2", "falcon_h1", "granitemoehybrid", "mamba2"]
)
def test_the_structure_tells_what_running_finds(kind: str) -> None:
    model = tiny_family(kind).model
    if kind != "mamba2":  # it has no attention
        model.set_attn_implementation(attention_key("exact"))
    told, found = carries_state(model.config), nature_of(model).packs
    assert (told is None) == (found is None), (told, found)
