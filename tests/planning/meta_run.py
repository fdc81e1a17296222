"""A training step of a real model on the meta device: every byte of it counted, nothing allocated or computed.

transformers' own classes at their full width, two layers deep, with the 4-bit layers, adapters, sweep and loss of
longfit. Attention allocates what a fused kernel does (``attention/backends/meta.py``).
"""

from dataclasses import dataclass

import torch
import transformers
from tests.meta_tensors import HostActivations, LiveBytes, bytes_of_tensors, positions_not_read
from torch import nn

from longfit.attention.hf_attention import attention_key
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.offload.activations import DeviceActivations
from longfit.engine.sweep.install import enable_sweep
from longfit.layers.linear4bit import Linear4bit
from longfit.model.adapters import add_adapters
from longfit.model.hf_quantizer import skipped_linears
from longfit.numerics.row_format import RowFormat


def quantized(model, *, quant):
    """Put empty 4-bit layers in the places where loading would."""
    skipped = skipped_linears(model, [])
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in skipped:
            fmt = RowFormat(module.out_features, module.in_features, quant, 64, True, 256, torch.bfloat16)
            layer = Linear4bit.placeholder(fmt, bias=module.bias is not None, bias_dtype=torch.bfloat16, device="meta")
            model.set_submodule(name, layer)
    return model


def meta_model(
    config,
    *,
    layers=2,
    rank=32,
    quant="nf4",
    train_embeddings=False,
    train_norms=False,
    attention="exact",
    group_size=None,
    targets="all-linear",
    dropout=0.0,
):
    """The model of a config dict with ``layers`` layers and adapters, on the meta device."""
    config = transformers.AutoConfig.for_model(**{**config})
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    text.max_position_embeddings = 1 << 20
    key = attention_key(attention, group_size)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.set_attn_implementation(key)
        if quant != "none":
            model = quantized(model, quant=quant)
        trained = {"train_embeddings": train_embeddings, "train_norms": train_norms}
        targets = targets if isinstance(targets, str) else list(targets)
        return add_adapters(model, rank=rank, targets=targets, dropout=dropout, **trained).train()


@dataclass
class Peaks:
    """Most live bytes above the weights."""

    weights: int
    forward: int
    backward: int


def step_peaks(config, *, num_tokens, tile, layers=2, offload="host", group_size=None, **settings):
    """Most live bytes in forward and in backward of one step; weights and adapters are counted apart."""
    attention = "shifted" if group_size else "exact"
    model = meta_model(config, layers=layers, attention=attention, group_size=group_size, **settings)
    with positions_not_read():
        place = HostActivations() if offload == "host" else DeviceActivations()
        report = enable_sweep(model, tile=tile, offload=place, saved_attention_bytes=0)
        assert not report.fallback, report.fallback
        ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
        with LiveBytes(model) as live:
            loss = training_loss(model, ids, num_items=num_tokens)
            forward, live.peak = live.peak, live.now
            loss.backward()
    return Peaks(bytes_of_tensors(model), forward, live.peak)
