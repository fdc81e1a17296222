"""Bytes per token on the accelerator, counted on the meta device: real models at full size, no weights, no GPU.

Live storages are counted while a training step runs at two lengths; the slope between them is what a token costs, in
forward and in backward, whichever is larger (a tile's activations, which do not grow, differ between the two). What
waits in host memory is not on the accelerator. The vocabulary is small, because its cost does not grow either.
Attention allocates what a fused kernel does (``attention/backends/meta.py``).
"""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tests.meta_tensors import HostActivations, LiveBytes, positions_not_read
from transformers.models import qwen3_5

from longfit.attention.hf_attention import attention_key
from longfit.engine.hf_model import base_model
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.offload.activations import DeviceActivations
from longfit.engine.sweep.install import enable_sweep

GROUP, TILE, SHORT, LONG = 4096, 2048, 8192, 16384  # a tile of shifted attention sees at most SHORT keys

SHAPES = {
    "Llama-3.1-8B": {"intermediate_size": 14336, "num_key_value_heads": 8},
    "Llama-2-7B": {"intermediate_size": 11008, "num_key_value_heads": 32},
}


def empty_model(shape, key):
    """Two layers of a Llama with adapters on all linear layers, without memory."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_hidden_layers=2,
        vocab_size=1024,
        max_position_embeddings=1 << 20,
        **shape,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=key)
        lora = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, lora, autocast_adapter_dtype=False, low_cpu_mem_usage=True).train()


def step_peaks(num_tokens, shape, group_size):
    """Most live bytes in forward and in backward of a step of two layers; weights and adapters are not counted."""
    key = attention_key("shifted", group_size) if group_size else attention_key()
    return peaks_of(empty_model(shape, key), num_tokens, HostActivations())


def peaks_of(model, num_tokens, offload):
    """The same for any model and any place of layer inputs."""
    with positions_not_read():
        return _peaks_of(model, num_tokens, offload)


def _peaks_of(model, num_tokens, offload):
    report = enable_sweep(model, tile=TILE, offload=offload, saved_attention_bytes=0)  # as on an accelerator
    assert len(report.layers) == base_model(model).config.num_hidden_layers
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    with LiveBytes(model) as live:
        loss = training_loss(model, ids, num_items=num_tokens)
        forward_peak, live.peak = live.peak, live.now
        loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)
    return forward_peak, live.peak


HIDDEN, BESIDE = 4096 * 2, 1024  # bytes of a hidden state; rotary tables (512), positions, labels and schedule


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("group_size", [None, GROUP])
def test_bytes_per_token(name, group_size, record_property):
    """Outputs are written over inputs and gradients over gradients; one more of either is a hidden state more.

    Forward holds a hidden state, the first layer's input, which nobody may write over, and keys and values; backward
    the gradient of a hidden state, keys, values and their float32 gradients, which cost nothing per token with groups.
    """
    short, long = (step_peaks(num_tokens, SHAPES[name], group_size) for num_tokens in (SHORT, LONG))
    forward, backward = ((b - a) / (LONG - SHORT) for a, b in zip(short, long, strict=True))
    record_property("bytes_per_token", (forward, backward))
    keys = 0 if group_size else 2 * 2 * 128 * SHAPES[name]["num_key_value_heads"]
    assert 2 * HIDDEN + keys < forward < 2 * HIDDEN + keys + BESIDE
    assert HIDDEN + 3 * keys < backward < HIDDEN + 3 * keys + BESIDE


def empty_qwen(kinds):
    """Qwen3.5's sizes with gated delta nets or attention, as the kinds say."""
    config = transformers.Qwen3_5TextConfig(
        hidden_size=2048,
        intermediate_size=6144,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_hidden_layers=len(kinds),
        layer_types=list(kinds),
        vocab_size=1024,
        max_position_embeddings=1 << 20,
    )
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention_key()
        )
        lora = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, lora, autocast_adapter_dtype=False, low_cpu_mem_usage=True).train()


def chunk_rule(query, key, value, *, g, beta, initial_state, **options):
    """What a kernel of the gated delta rule returns: its output, and the state behind the last token."""
    state = torch.einsum("bthk,bthv->bhkv", key.float(), value.float())
    return query + value * beta[..., None] * g[..., None].to(
        value
    ), state if initial_state is None else state + initial_state


def test_a_hybrid_costs_no_more_per_token_than_attention_alone(record_property, monkeypatch):
    """A gated delta net beside attention, all on the device: a state is saved once a tile, not once a token."""
    monkeypatch.setattr(qwen3_5.modeling_qwen3_5, "torch_chunk_gated_delta_rule", chunk_rule)
    slopes = []
    for kinds in (("linear_attention", "full_attention"), ("full_attention", "full_attention")):
        short, long = (peaks_of(empty_qwen(kinds), n, DeviceActivations()) for n in (2 * TILE, 4 * TILE))
        slopes.append(max((b - a) / (2 * TILE) for a, b in zip(short, long, strict=True)))
    record_property("bytes_per_token", slopes)
    hybrid, attention = slopes
    assert 4_096 < hybrid < 1.3 * attention
