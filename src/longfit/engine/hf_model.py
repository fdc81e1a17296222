"""Where a transformers model is entered: its decoder, its last norm, its output matrix. Nothing of it is changed.

The loss needs the hidden states *before* the last norm, because that norm, run over the whole sequence with its float32
copies, would cost more than all else that is held per token. :func:`hidden_states` gets them without a patch: a
forward hook catches the norm's input and hands the norm no token at all, so that it costs nothing and the caller can
apply it tile by tile.
"""

import sys
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from longfit.errors import ModelError

LAST_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
"""What decoders call the module that makes their last hidden state: Llama and its kin, Phi, GPT-NeoX, Falcon."""


@dataclass(frozen=True)
class OutputHead:
    """What a causal language model does to its hidden states to get logits: cap(scale (h W^T + b))."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself.

    Raises: ModelError: it is neither, or the adapter is not one that lives in the layers.
    """
    from transformers import PreTrainedModel

    peft = sys.modules.get("peft")  # imported by whoever made a PeftModel; to import it takes seconds
    if peft is not None and isinstance(model, peft.PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"{type(model.active_peft_config).__name__}: prompt learning changes the inputs of the model, "
                "which the tiled loss does not do; train a LoRA adapter instead"
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__}: must be a transformers causal language model or a PeftModel around one"
        )
    return model


def decoder(model: nn.Module) -> Any:
    """The part of a causal language model that ends in hidden states: embeddings, layers, last norm.

    Raises: ModelError: ``model`` is no causal language model.
    """
    from transformers import PreTrainedModel

    base = base_model(model)
    embeddings = base.get_input_embeddings()
    # Some heads have a Linear that is called decoder, and some models name a base model that they do not have.
    for found in (base.get_decoder(), base.base_model, *base.children()):
        inside = isinstance(found, PreTrainedModel) and found is not base
        if inside and any(module is embeddings for module in found.modules()):
            return found
    raise ModelError(f"{type(base).__name__} has no output matrix: load it with AutoModelForCausalLM")


def last_norm(entered: nn.Module) -> nn.Module | None:
    """The module of a decoder that may make its last hidden state."""
    children = dict(entered.named_children())
    return next((children[name] for name in LAST_NORMS if name in children), None)


def hidden_states(model: nn.Module, *, defer_norm: bool = True, **inputs: Any) -> tuple[Tensor, nn.Module | None]:
    """Run the decoder up to, not through, its last norm.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        defer_norm: whether the decoder is known to end in its norm; if not, it runs through it.
        inputs: of the decoder's forward.
    Returns: the hidden states ``[B, T, D]``, and the norm that the caller has still to apply; None when it is applied,
        which happens, with a warning, where the decoder does not end in one of ``LAST_NORMS``.
    Raises: ModelError: as :func:`decoder`.
    """
    entered = decoder(model)
    norm = last_norm(entered)
    if norm is None or not defer_norm:
        return entered(**inputs).last_hidden_state, None
    caught: list[Tensor] = []
    made: list[Any] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(args[0])
        return (args[0][:, :0].detach(), *args[1:])

    hooks = [norm.register_forward_pre_hook(catch), norm.register_forward_hook(lambda *call: made.append(call[2]))]
    try:
        last = entered(**inputs).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if len(caught) == 1 and made[0] is last:
        return caught[0], norm
    warnings.warn(
        f"{type(entered).__name__} does not end in its {type(norm).__name__}: it runs a second time, with the norm over"
        " the whole sequence; this costs a forward pass and memory, not exactness",
        stacklevel=3,
    )
    return entered(**inputs).last_hidden_state, None


def output_head(model: nn.Module) -> OutputHead:
    """The effective output matrix, with what PEFT has put around it, and the family's scaling of logits.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
    Raises: ModelError: the head is not a linear map whose matrix can be known, or the family's logits are made in a way
        this function does not know.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ModelError(
            f"{type(base).__name__}: config.output_router_logits=True adds a router loss to the model's own, which "
            "longfit does not compute; set it to False"
        )
    head = base.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(base).__name__} has no output matrix: load it with AutoModelForCausalLM")
    weight, bias = _effective_linear(head)
    softcap, scale = _logit_rule(config)
    return OutputHead(weight, bias, softcap, scale)


def _effective_linear(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear map that calling ``head`` computes, through PEFT's wrappers."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(head, ModulesToSaveWrapper):
        if head.disable_adapters or not set(head.active_adapters) & set(head.modules_to_save):
            return _effective_linear(head.original_module)
        return _effective_linear(head.modules_to_save[head.active_adapters[0]])
    if isinstance(head, TrainableTokensWrapper):
        layer = head.token_adapter
        if layer.disable_adapters or layer.merged or not layer.active_adapters:
            return _effective_linear(layer.base_layer)
        return layer.get_merged_weights(layer.active_adapters), None  # PEFT's own forward leaves a bias out
    if isinstance(head, LoraLayer):
        return _with_lora(head)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ModelError(
            f"output head {type(head).__name__}: must be a plain Linear, one trained with modules_to_save, or one with "
            "LoRA; leave the head out of quantisation and of other adapter kinds"
        )
    return head.weight, head.bias


def _with_lora(head: Any) -> tuple[Tensor, Tensor | None]:
    """W + sum of scaling B A: one matrix of the head's size, through which autograd reaches A and B."""
    weight, bias = _effective_linear(head.get_base_layer())
    if head.disable_adapters or head.merged:
        return weight, bias
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        dropout = head.training and not isinstance(head.lora_dropout[name], nn.Identity)
        if name in head.lora_magnitude_vector or head.lora_bias.get(name, False) or dropout:
            raise ModelError(
                f"LoRA {name!r} on the output head uses DoRA, a bias or dropout: then no single matrix stands for it; "
                "use plain LoRA without dropout there, or train the head with modules_to_save"
            )
        update = head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
        weight = weight + update.to(weight.dtype)
    return weight, bias


_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def _logit_rule(config: Any) -> tuple[float | None, float]:
    """Soft cap and factor on the logits, from the config keys by which families announce them.

    Gemma-2/3/4, nanochat: ``final_logit_softcapping``; RecurrentGemma, xLSTM: names of their own. Cohere: times
    ``logit_scale``; Falcon-H1: times ``lm_head_multiplier``. Granite: divided by ``logits_scaling``; HyperCLOVA X
    multiplies by the same key. MiniCPM3 divides by ``hidden_size / dim_model_base``. That the model has no other rule
    is what the probe checks (``sweep/probe.py``).
    """
    keys = config.to_dict()
    softcap = next((keys[key] for key in _SOFT_CAPS if keys.get(key) is not None), None)
    scale, scaling = keys.get("logit_scale") or 1.0, keys.get("logits_scaling") or 1.0
    multiplies = config.model_type.startswith("hyperclovax")
    scale = scale * scaling if multiplies else scale / scaling
    scale *= keys.get("lm_head_multiplier") or 1.0
    if keys.get("dim_model_base"):
        scale *= keys["dim_model_base"] / config.hidden_size
    return softcap, float(scale)
