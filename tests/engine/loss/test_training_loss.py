"""The loss of models, with the heads of their families and adapters on them, against their own logits; and labels."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tests.exact_norms import exact_norms
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor, nn

from longfit.engine.hf_model import output_head
from longfit.engine.loss.training_loss import TrainingLoss, shifted_labels, training_loss
from longfit.errors import ModelError

# float64, sums of at most a few thousand terms of order one in another order: 1e3 x 2.2e-16, with a margin of five.
EXACT = 1e-12
# A mixture of experts weighs them in float32: a last-bit difference of a gradient can flip the rounding (6e-8) of one
# element out of several hundred.
MIXED = 1e-8


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def whole_model_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """The model's own logits; transformers' own loss would round them to float32."""
    return F.cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1), targets.flatten())


def parameter_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_training_loss_equals_the_model(family, tied):
    model = exact_norms(tiny_model(family, tie_word_embeddings=tied))
    ids = torch.randint(3, VOCABULARY, (2, 11))
    targets = shifted_labels(ids, None, None, None)
    reference = whole_model_loss(model, ids, targets)
    expected = parameter_gradients(model, reference)
    loss = training_loss(model, ids, engine="plain")
    got = parameter_gradients(model, loss)
    assert abs(loss - reference) < EXACT * reference
    assert got.keys() == expected.keys()
    assert max((relative(got[n], expected[n]), n) for n in got)[0] < (MIXED if family == "mixtral" else EXACT)
    # and transformers' own loss, which rounds the logits to float32
    own = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert abs(loss - own) < 1e-6 * own


@pytest.mark.parametrize(
    ("model_type", "config", "factor"),
    [("CohereForCausalLM", {"logit_scale": 0.0625}, 0.0625), ("GraniteForCausalLM", {"logits_scaling": 8.0}, 0.125)],
)
def test_families_that_scale_their_logits(model_type, config, factor):
    import transformers

    model_class = getattr(transformers, model_type)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings = model_class.config_class(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, pad_token_id=0, **config)
    model = model_class._from_config(settings, attn_implementation="eager").double()
    assert output_head(model).scale == factor
    ids = torch.randint(3, VOCABULARY, (1, 9))
    reference = whole_model_loss(model, ids, shifted_labels(ids, None, None, None))
    assert abs(training_loss(model, ids, engine="plain") - reference) < EXACT * reference


@pytest.mark.parametrize(
    "adapter",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_on_the_head_and_the_embeddings(adapter, tied):
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | adapter))
    model = exact_norms(tiny_model("llama", tie_word_embeddings=tied))
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    ids = torch.randint(3, VOCABULARY, (2, 11))
    reference = whole_model_loss(model, ids, shifted_labels(ids, None, None, None))
    expected = parameter_gradients(model, reference)
    loss = training_loss(model, ids, engine="plain")
    got = parameter_gradients(model, loss)
    assert abs(loss - reference) < EXACT * reference
    assert got.keys() == expected.keys()
    assert max((relative(got[n], expected[n]), n) for n in got)[0] < EXACT
    with model.disable_adapter():
        assert (
            abs(
                training_loss(model, ids, engine="plain")
                - whole_model_loss(model, ids, shifted_labels(ids, None, None, None))
            )
            < 1e-11
        )


def test_labels_stop_at_documents_and_padding():
    ids = torch.arange(10, 18)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]])
    assert shifted_labels(ids, None, positions, None).tolist() == [[11, 12, -100, 14, 15, 16, 17, -100]]
    assert shifted_labels(ids, None, None, mask).tolist() == [[-100, 12, 13, 14, 15, 16, -100, -100]]
    chosen = torch.where(ids % 2 == 0, ids, -100)
    assert shifted_labels(ids, chosen, None, None).tolist() == [[-100, 12, -100, 14, -100, 16, -100, -100]]
    with pytest.raises(ValueError, match="must have the shape of input_ids"):
        shifted_labels(ids, chosen[:, 1:], None, None)


def test_a_decoder_that_ends_otherwise_is_run_again_and_says_so():
    model, ids = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 11))
    expected = training_loss(model, ids, engine="plain")
    model.model.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=output.last_hidden_state.clone())
    )
    with pytest.warns(UserWarning, match="does not end in its LlamaRMSNorm"):
        assert torch.equal(training_loss(model, ids, engine="plain"), expected)


def test_models_that_cannot_be_entered_are_named():
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(ModelError, match="output_router_logits"):
        training_loss(model, torch.ones(1, 4, dtype=torch.long))
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="no output matrix"):
        training_loss(model.model, torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ModelError, match="must be a transformers causal language model"):
        training_loss(nn.Linear(2, 2), torch.ones(1, 4, dtype=torch.long))
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="output head Sequential"):
        training_loss(model, torch.ones(1, 4, dtype=torch.long))


def test_the_module_around_the_model_is_the_loss():
    model, ids = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 11))
    assert torch.equal(TrainingLoss(model)(ids, num_items=7), training_loss(model, ids, num_items=7))
