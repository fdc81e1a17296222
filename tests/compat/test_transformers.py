"""What longfit takes for granted of transformers beyond its public names; each test says what breaks when it is red."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from tests.families.tiny_family import tiny_family
from tests.tiny_models import tiny_model

from longfit.compat import transformers as compat


def test_layers_come_to_the_function_with_their_forward_and_their_keywords() -> None:
    """Else nothing is swept: layers are checkpointed in the ordinary way, and a token costs ten times the memory."""
    model, calls = tiny_model("llama"), []

    def run(function, *args):
        calls.append((function, args))
        return function(*args)

    compat.set_checkpoint_function(model, run)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    assert [function.args[0] for function, _ in calls] == list(model.model.layers)
    for function, args in calls:
        assert isinstance(function, partial)
        assert args[0].shape == (1, 4, 48)
        assert {"position_ids", "position_embeddings"} <= function.keywords.keys()
    assert any(compat.checkpoint_function(module) is run for module in model.modules())
    compat.set_checkpoint_function(model, None)
    assert not any(compat.checkpoint_function(module) for module in model.modules())
    calls.clear()
    model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    assert calls == []


def test_what_is_checkpointed_is_in_two_attributes() -> None:
    """Else a model is not left as it was found after a gradient check or an evaluation."""
    model = tiny_model("llama")
    compat.set_checkpoint_function(model, lambda function, *args: function(*args))
    owners = [module for module in model.modules() if compat.CHECKPOINTING[1] in vars(module)]
    assert owners
    assert all(vars(module)[compat.CHECKPOINTING[0]] for module in owners)


def test_the_attention_of_a_model_is_named() -> None:
    """Else the sweep takes a model's own attention for longfit's, and refuses to run."""
    model = tiny_model("gemma3")
    assert compat.attention_of(model) == "eager"
    model.set_attn_implementation("sdpa")
    assert compat.attention_of(model) == "sdpa"


def test_a_configuration_chooses_no_kernels() -> None:
    """Else a folder could name code on the hub, which transformers would fetch and run."""
    config = tiny_model("mixtral").config
    config._attn_implementation, config._experts_implementation = "somebody/attention", "somebody/experts"
    compat.forget_kernels(config)
    assert config._attn_implementation is None
    assert config._experts_implementation is None


def test_tied_weights_are_named() -> None:
    """Else a tied output matrix is stored twice, or missed when a checkpoint is read."""
    assert compat.tied_weights(tiny_model("llama", tie_word_embeddings=True)) == {
        "lm_head.weight": "model.embed_tokens.weight"
    }
    assert compat.tied_weights(tiny_model("llama", tie_word_embeddings=False)) == {}


def test_what_is_filled_by_us_is_marked() -> None:
    """Else the loader draws random weights into the quantised layers that are filled afterwards."""
    from transformers import modeling_utils

    module = SimpleNamespace()
    compat.do_not_initialize(module)
    assert list(vars(module)) == ["_is_hf_initialized"]
    assert "_is_hf_initialized" in Path(modeling_utils.__file__).read_text(encoding="utf-8")


def test_a_family_says_whether_it_runs_with_torchs_attention() -> None:
    """Else a model that does not run with longfit's attention could be given one that it does not run with either."""
    assert compat.supports_sdpa(tiny_model("llama"))
    assert not compat.supports_sdpa(tiny_family("gpt_oss").model)
