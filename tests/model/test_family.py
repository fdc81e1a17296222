"""What is understood of a model: of each kind one that has it, and what cannot be done with it by name."""

import json

import pytest
import torch
from tests.families.tiny_family import tiny_family

from longfit.engine.sweep.attention_choice import take_exact_attention
from longfit.errors import ModelError
from longfit.model.adapters import add_adapters
from longfit.model.family import Family, understand


def understood(kind: str) -> Family:
    model = tiny_family(kind).model
    return understand(model, nature=take_exact_attention(model))


def test_attention_is_told_as_the_layers_ask_for_it() -> None:
    found = understood("gpt_oss")
    window, whole = found.layers
    assert window.attends == "6 query heads on 2 of 8 numbers, a window of 9, sinks"
    assert whole.attends == "6 query heads on 2 of 8 numbers, sinks"
    assert window.sweeps is whole.sweeps is found.packs is None
    assert found.experts == {"GptOssExperts": "4 in each of 2 layers"}
    assert understood("deepseek_v3").layers[0].attends == "6 query heads on 6 of 12 numbers, values of 6"
    assert understood("gemma2").layers[1].attends == "6 query heads on 2 of 8 numbers, scores capped at 50"
    assert understood("llama4_text").layers[0].attends.endswith("chunks or a window that its mask tells")


def test_a_recurrent_layer_is_named_and_decides_packing() -> None:
    found = understood("qwen3_5_text")
    recurrent, attention = found.layers
    assert recurrent.attends == attention.carries == ""
    assert recurrent.carries == "the last 3 inputs of a convolution and a state of 256 numbers"
    assert recurrent.sweeps is recurrent.packs_swept is attention.sweeps is None
    assert "across documents" in (recurrent.packs or "")
    assert found.packs is not None
    assert found.packs_swept is None
    assert "swept, carrying the last 3 inputs of a convolution and a state of 256 numbers" in str(found)
    assert "documents share windows where swept layers begin each document without a state" in str(found)
    assert "where layers run whole one a window: model.layers.0: Qwen3_5DecoderLayer carries" in str(found)
    assert found.mixing("sweep") is None
    assert found.mixing("plain") == found.packs


def test_a_recurrent_model_that_is_not_told_positions_keeps_its_documents_apart() -> None:
    found = understood("granitemoehybrid")
    assert all(kind.sweeps is None for kind in found.layers)
    assert "one document a window: model.layers.0: GraniteMoeHybridDecoderLayer carries something" in str(found)


def test_the_head_and_the_parts_of_a_wrapper() -> None:
    found = understood("gemma3")
    assert (found.model, found.decoder, found.tied) == (
        "Gemma3ForConditionalGeneration",
        "Gemma3TextModel",
        True,
    )
    assert all("vision_tower" in name or "projector" in name for name in found.no_adapter)
    assert understood("granite").head == "97 rows of 48"
    assert understood("gemma2").head == "97 rows of 48, logits capped at 30"


def test_what_is_not_understood_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="BertLMHeadModel makes its logits in a way"):
        understood("bert").require_trainable()
    with pytest.raises(ModelError, match="lets tokens see later ones"):
        understood("xlnet").require_trainable()
    understood("llama").require_trainable()


def test_adapters_change_nothing_and_json_holds_it_all() -> None:
    model = tiny_family("llama4_text", dtype=torch.float32).model
    before = understand(model, nature=take_exact_attention(model))
    after = understand(add_adapters(model, rank=2))
    read = json.loads(after.to_json())
    assert read["no_adapter"] == before.no_adapter
    assert [kind["attends"] for kind in read["layers"]] == [kind.attends for kind in before.layers]
    assert read.keys() == vars(before).keys()
