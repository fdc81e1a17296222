"""A training step of a real model on fake tensors: every byte of it counted, nothing of it allocated or computed.

transformers' own classes at their full width, two layers deep, with the 4-bit layers, adapters, sweep and loss of
longfit. Attention is replaced by what a fused kernel allocates (output, log-sum-exp, query gradient and its float32
sum), because a fake tensor has no values to attend with.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
import transformers
from tests.fake_tensors import HostActivations, LiveBytes, tile_backward, tile_forward
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from longfit.attention import spec as attention_spec
from longfit.attention.hf_attention import attention_key
from longfit.attention.visibility import build_schedule, document_starts
from longfit.engine.loss import logits
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.offload.activations import DeviceActivations
from longfit.engine.sweep import layer_probe, tile_pass
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.recompute_state import RandomState
from longfit.engine.sweep.tile_pass import Visible
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


def fill(model):
    """Give every parameter and buffer a tensor of the mode that is on; ties stay ties."""
    made = {}

    def fresh(old):
        if id(old) not in made:
            made[id(old)] = (old, torch.empty(old.shape, dtype=old.dtype))
        return made[id(old)][1]

    parameters = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in parameters:
                    parameters[id(p)] = (p, nn.Parameter(fresh(p), p.requires_grad))
                module._parameters[name] = parameters[id(p)][1]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = fresh(b)


@dataclass
class Peaks:
    """Most live bytes above the weights."""

    weights: int
    forward: int
    backward: int
    after: int


def step_peaks(config, *, num_tokens, tile, layers=2, offload="host", group_size=None, windows=(None,), **settings):
    """Most live bytes in forward and in backward of one step; weights and adapters are counted apart."""
    attention = "shifted" if group_size else "exact"
    model = meta_model(config, layers=layers, attention=attention, group_size=group_size, **settings)
    starts = document_starts(1, num_tokens)

    original_of = Visible.of.__func__
    known = {}
    for window in {*windows, None}:
        schedule = build_schedule(2, starts, group_size=group_size, sliding_window=window)
        known[window] = original_of(Visible, schedule, tile)
    original_build = build_schedule

    def build(num_heads, document_start, *, group_size=None, sliding_window=None):
        build.last = sliding_window
        return original_build(num_heads, document_start, group_size=group_size, sliding_window=sliding_window)

    def Visible_of(schedule, tile):
        window = build.last
        if window not in known:
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                s = original_build(2, document_starts(1, num_tokens), group_size=group_size, sliding_window=window)
                known[window] = original_of(Visible, s, tile)
        return known[window]

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for module in (tile_pass, layer_probe):
            patch.setattr(module, "tile_forward", tile_forward)
        patch.setattr(tile_pass, "tile_backward", tile_backward)
        patch.setattr(attention_spec, "build_schedule", build)
        patch.setattr(tile_pass.Visible, "of", Visible_of)
        patch.setattr(logits, "CPU_LOGITS", logits.DEVICE_LOGITS)  # fake tensors are on the CPU
        patch.setattr(RandomState, "same", lambda self, other: True)
        live = LiveBytes()
        with live:
            fill(model)
        weights, live.peak = live.now, 0
        report = enable_sweep(
            model,
            tile=tile,
            offload=HostActivations() if offload == "host" else DeviceActivations(),
            saved_attention_bytes=0,
        )
        assert not report.fallback, report.fallback
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        with live:
            loss = training_loss(model, ids, num_items=num_tokens)
            forward, live.peak = live.peak, live.now
            loss.backward()
        peaks = Peaks(weights, forward - weights, live.peak - weights, live.now - weights)
        return peaks
