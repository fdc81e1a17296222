"""What a probe finds: each kind of mixing is made here by a few lines, in a model of which only they are new."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families.tiny_family import tiny_family
from tests.tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn

from longfit.attention.hf_attention import attention_key
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.probe import nature_of
from longfit.errors import ModelError


class Carries(nn.Module):
    """An MLP that also gets something of the token before."""

    def __init__(self, mlp: nn.Module, *, step: int = 1) -> None:
        super().__init__()
        self.mlp, self.step = mlp, step

    def forward(self, x: Tensor) -> Tensor:
        shifted = x.roll(self.step, 1)
        shifted[:, : self.step] *= self.step < 0
        return self.mlp(x) + 0.1 * shifted


@dataclass
class InPlace:
    """Says where a layer's weights are, and knows the model, as a sweep does."""

    base: Any

    def present(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


def model(**options: Any) -> Any:
    return tiny_model("llama", attn_implementation=attention_key(), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_decoder_packs_sweeps_and_ends_in_its_norm(dtype: torch.dtype) -> None:
    plain = model(dtype=dtype)
    before = [(module, module.training) for module in plain.modules()]
    nature = nature_of(plain)
    assert nature.packs is None
    assert nature.causal is None
    assert nature.head is None
    assert nature.ends_in_norm
    assert [found.sweeps for found in nature.layers.values()] == [None, None]
    assert all(module.training == mode for module, mode in before)
    assert not plain.is_gradient_checkpointing


def test_a_probed_layer_is_copied_without_the_model_and_without_its_packed_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = model(dtype=torch.bfloat16)
    packed = torch.zeros(2, 8, dtype=torch.uint8)  # one storage, of which each layer has a slice
    for layer, rows in zip(plain.model.layers, packed, strict=True):
        layer.mlp.register_buffer("packed", rows)

    def refuse(copied: Any, memo: Any) -> Any:
        raise AssertionError(f"{type(copied).__name__} was copied")

    monkeypatch.setattr(type(plain), "__deepcopy__", refuse, raising=False)
    monkeypatch.setattr(torch.UntypedStorage, "__deepcopy__", refuse)
    present = InPlace(plain).present
    assert [found.sweeps for found in nature_of(plain, present=present).layers.values()] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_state_beside_attention_is_found_and_only_in_its_layer(dtype: torch.dtype) -> None:
    hybrid = model(dtype=dtype)
    hybrid.model.layers[1].mlp = Carries(hybrid.model.layers[1].mlp)
    first, second = nature_of(hybrid).layers.values()
    assert first == type(first)(attends="6 query heads on 2 of 8 numbers")
    assert "carries a state from token to token besides attention" in (second.sweeps or "")
    assert "model.layers.1: LlamaDecoderLayer carries something" in (nature_of(hybrid).packs or "")


class Uncopied(nn.Module):
    """Fails a test that copies it."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("copied")


def test_a_16_bit_model_is_probed_without_a_copy_of_more_than_a_layer(tmp_path: Path) -> None:
    """A layer's own attributes lead to the probe, from there to the model, and to an open file that nothing copies."""
    halved = model(dtype=torch.bfloat16)
    halved.bystander = Uncopied()
    with warnings.catch_warnings(action="error", category=UserWarning):
        report = enable_sweep(halved, tile=7, offload="file", offload_folder=tmp_path)
    assert report.layers == ("model.layers.0", "model.layers.1")
    assert not report.fallback


def test_packed_documents_are_refused_where_they_see_each_other_and_padding_is_not() -> None:
    hybrid = model()
    hybrid.model.layers[0].mlp = Carries(hybrid.model.layers[0].mlp)
    ids = torch.randint(3, VOCABULARY, (1, 12))
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with pytest.warns(UserWarning, match="carries a state"):
        enable_sweep(hybrid)
    with pytest.raises(ModelError, match=r"carries something.*packed documents would see each other"):
        training_loss(hybrid, ids, position_ids=positions)
    labels = ids.clone()
    labels[:, 7:] = -100
    alone = training_loss(hybrid, ids[:, :7])
    assert training_loss(hybrid, ids, position_ids=positions, labels=labels).allclose(alone, rtol=1e-12)


def test_a_model_in_which_tokens_see_later_ones_is_refused() -> None:
    leaky = model()
    leaky.model.layers[0].mlp = Carries(leaky.model.layers[0].mlp, step=-1)
    with pytest.raises(ModelError, match="lets tokens see later ones"):
        enable_sweep(leaky)


def test_keys_that_layers_hand_on_in_a_mapping_are_found() -> None:
    """Gemma-4's upper layers read keys and values that lower ones wrote into a mapping."""
    shared = tiny_family("gemma4_text").model
    shared.set_attn_implementation(attention_key())
    natures = nature_of(shared).layers.values()
    assert len(natures) == 4
    assert all("written by one layer and read by others" in (nature.sweeps or "") for nature in natures)
    assert nature_of(shared).packs is None


def test_logits_made_in_another_way_are_refused() -> None:
    odd = model()
    odd.lm_head.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(ModelError, match="LlamaForCausalLM makes its logits in a way that longfit does not know"):
        training_loss(odd, torch.randint(3, VOCABULARY, (1, 12)))
