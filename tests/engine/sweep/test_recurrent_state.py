"""Layers that carry a state from token to token, swept: against the model's own run, whole, in float64."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.exact_float64 import exact_float64
from tests.families.tiny_family import tiny_family
from torch import Tensor, nn

from longfit.engine.hf_model import base_model
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.offload.activations import FileActivations
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.recurrent_state import TileState, document_stretches
from longfit.engine.sweep.shared_sequence import Stretch
from longfit.errors import ModelError
from longfit.model.adapters import add_adapters

EXACT = 1e-10
"""Of the largest gradient. The two sides add some thousand float64 terms in another order, 1e-16 each, in a recurrence
whose chunks begin at other tokens. A state that is not carried changes gradients by 1e-3 and more."""

PACKS = ["qwen3_next", "qwen3_5_text", "lfm2", "bamba"]
KINDS = [*PACKS, "granitemoehybrid"]
Gradients = tuple[float, dict[str, Tensor]]


def own(model: nn.Module, documents: list[Tensor]) -> Gradients:
    """Loss and gradients of documents, each alone, by the model as it is."""
    with exact_float64():
        losses = []
        for ids in documents:
            logits = model(input_ids=ids, use_cache=False).logits
            losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        return gradients(model, torch.stack(losses).sum())


def swept(model: nn.Module, ids: Tensor, *, num_items: int, tile: int, **inputs: Any) -> Gradients:
    """The same from longfit; every layer must be swept."""
    options = {name: inputs.pop(name) for name in ("offload",) if name in inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = enable_sweep(model, tile=tile, **options)
    assert len(report.layers) == base_model(model).config.get_text_config().num_hidden_layers
    with exact_float64():
        return gradients(model, training_loss(model, ids, num_items=num_items, **inputs) * num_items)


def gradients(model: nn.Module, loss: Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_equal(found: Gradients, expected: Gradients) -> None:
    assert abs(found[0] - expected[0]) <= EXACT * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    size = max(float(g.norm()) for g in expected[1].values())
    errors = {name: float((found[1][name] - g).norm()) / size for name, g in expected[1].items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= EXACT, (worst, errors[worst])


# ------------------------------------------------------------------------------------------------ exactness
@pytest.mark.parametrize("tile", [8, 14], ids=["tiles of 8 and 5", "a last tile of one token"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_that_of_the_model_as_it_is(kind: str, tile: int) -> None:
    """All parameters train: convolutions, decays and time steps as well."""
    family = tiny_family(kind)
    ids = family.tokens(1, 29)
    expected = own(family.model, [ids])
    require_equal(swept(family.model, ids, num_items=28, tile=tile), expected)


@pytest.mark.parametrize("kind", PACKS)
def test_a_document_begins_without_a_state(kind: str) -> None:
    family = tiny_family(kind)
    ids = family.tokens(1, 29)
    expected = own(family.model, [ids[:, :12], ids[:, 12:]])
    positions = torch.cat([torch.arange(12), torch.arange(17)])[None]
    require_equal(swept(family.model, ids, num_items=27, tile=8, position_ids=positions), expected)


@pytest.mark.parametrize("kind", ["qwen3_next", "bamba"])
def test_rows_whose_documents_begin_at_different_tokens(kind: str) -> None:
    """Between the two borders lies one token, which a row's document goes on through."""
    family = tiny_family(kind)
    ids = family.tokens(2, 21)
    expected = own(family.model, [ids[:1, :9], ids[:1, 9:], ids[1:, :10], ids[1:, 10:]])
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(21 - n)]) for n in (9, 10)])
    require_equal(swept(family.model, ids, num_items=38, tile=6, position_ids=positions), expected)


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2", "granitemoehybrid"])
def test_adapters_with_states_in_a_file(kind: str) -> None:
    family = tiny_family(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = add_adapters(family.model, rank=2, alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model.train()
    ids = family.tokens(1, 23)
    expected = own(model, [ids])
    assert all("lora" in name for name in expected[1])
    offload = FileActivations()
    require_equal(swept(model, ids, num_items=22, tile=5, offload=offload), expected)


def test_padding_before_a_text() -> None:
    family = tiny_family("qwen3_next")
    ids = family.tokens(1, 20)
    mask = torch.ones(1, 29, dtype=torch.int64)
    mask[:, :9] = 0
    padded = F.pad(ids, (9, 0), value=0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = own(family.model, [ids])
    found = swept(family.model, padded, num_items=19, tile=8, attention_mask=mask, position_ids=positions)
    require_equal(found, expected)


# ------------------------------------------------------------------------------------------------ what is refused
def test_plain_layers_still_refuse_packed_documents() -> None:
    family = tiny_family("lfm2")
    ids, positions = family.tokens(1, 12), torch.arange(12)[None] % 6
    enable_sweep(family.model, tile=8)
    with pytest.raises(ModelError, match="packed documents would see each other"):
        training_loss(family.model, ids, position_ids=positions, engine="plain")


def test_a_state_through_which_no_gradient_flows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny_family("lfm2")
    update = TileState.update_conv_state
    monkeypatch.setattr(TileState, "update_conv_state", lambda *args, **options: update(*args, **options).detach())
    with pytest.warns(UserWarning, match="no gradient flows"):
        report = enable_sweep(family.model, tile=8)
    assert len(report.layers) == 1


def test_a_call_that_tells_borders_by_lengths_is_checkpointed() -> None:
    family = tiny_family("lfm2")
    enable_sweep(family.model, tile=8)
    ids = family.tokens(1, 12)
    with pytest.warns(UserWarning, match="give position_ids alone"):
        family.model(input_ids=ids, use_cache=False, cu_seq_lens_q=torch.tensor([0, 12]), max_length_q=12)
    packed = {"cu_seq_lens_q": torch.tensor([0, 6, 12]), "position_ids": torch.arange(12)[None] % 6}
    with pytest.raises(ModelError, match="packed documents would see each other"):
        family.model(input_ids=ids, use_cache=False, max_length_q=6, **packed)


# ------------------------------------------------------------------------------------------------ the parts
def test_the_last_inputs_of_a_convolution() -> None:
    state = TileState({}, 2)
    inputs = torch.arange(2.0).view(1, 1, 2)
    assert state.get_conv_state(0) is None
    assert state.update_conv_state(inputs, 0, conv_kernel_size=4) is inputs
    assert state.outgoing["conv", 0, 0].tolist() == [[[0.0, 0.0, 1.0]]]
    after = TileState(state.outgoing, 2)
    assert after.update_conv_state(inputs + 2, 0, conv_kernel_size=4).tolist() == [[[0.0, 0.0, 1.0, 2.0, 3.0]]]
    assert after.outgoing["conv", 0, 0].tolist() == [[[1.0, 2.0, 3.0]]]


def test_a_kernel_for_one_token_may_write_over_the_state() -> None:
    before = torch.ones(1, 2)
    state = TileState({("recurrent", 0, 0): before}, 1)
    handed = state.get_recurrent_state(0)
    assert handed is not None
    handed.mul_(3)
    assert before.tolist() == [[1.0, 1.0]]
    assert state.outgoing["recurrent", 0, 0].tolist() == [[3.0, 3.0]]


def test_a_sequence_is_cut_where_a_document_of_some_row_begins() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    stretches, continuing = document_stretches(positions, 2, 7, 2)
    assert stretches == (Stretch(0, 3, 0), Stretch(3, 2, 2), Stretch(5, 2, 3))
    assert continuing[0] is None
    assert [rows.tolist() for rows in (continuing[2], continuing[3]) if rows is not None] == [
        [False, True],
        [True, False],
    ]
