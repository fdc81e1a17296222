"""A tiny model of every causal language model that transformers registers, its config derived from the defaults.

Nothing is listed by hand but the sizes: every field of a default configuration whose *name* says that it is a width, a
count or a kind per layer gets a small value, awkward where it can be (six query heads on two key/value heads, an odd
vocabulary), and every kind of layer that the defaults name is kept at least once. ``REPAIRS`` holds the few fields that
a family derives from others.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY = 97
WINDOW = 9
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8

SIZES: dict[str, Any] = {
    # widths
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "emb_dim",
            "embedding_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "input_embedding_size",
            "output_embedding_size",
            "lru_width",
            "mamba_d_ssm",
            "attention_hidden_size",
        ),
        HEADS * HEAD_DIM,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "dim_ff",
            "dff",
            "d_inner",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "feed_forward_size",
            "shared_intermediate_size",
            "dense_intermediate_size",
            "intermediate_size_mlp",
            "prefix_dense_intermediate_size",
        ),
        80,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "expert_intermediate_size",
        ),
        24,
    ),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "d_head", "attention_head_size", "kv_channels"), HEAD_DIM),
    "global_head_dim": 2 * HEAD_DIM,
    "swa_head_dim": HEAD_DIM,
    "swa_v_head_dim": HEAD_DIM,
    "attention_head_dim": HEAD_DIM,
    "rotary_dim": 4,
    "router_hidden_size": 16,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "o_lora_rank": 8,
    "o_groups": 2,
    "adapter_rank": 4,
    "loop_gate_rank": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "query_pre_attn_scalar": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    # heads
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
            "num_decoder_attention_heads",
            "num_encoder_attention_heads",
            "swa_num_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads",
            "num_kv_heads",
            "kv_n_heads",
            "num_query_groups",
            "swa_num_key_value_heads",
            "num_global_key_value_heads",
        ),
        KV_HEADS,
    ),
    # layers
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_blocks",
            "num_decoder_layers",
            "num_encoder_layers",
            "num_layers_per_stack",
        ),
        2,
    ),
    "n_input_layers": 1,
    "n_recurrent_layers": 1,
    "n_output_layers": 1,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_kv_shared_layers": 0,
    "loop_layer_index_start": 0,
    "loop_layer_index_end": 1,
    "max_window_layers": 1,
    # vocabulary and positions
    **dict.fromkeys(
        ("vocab_size", "decoder_vocab_size", "audio_vocab_size", "pronunciation_vocab_size", "shape_vocab_size"),
        VOCABULARY,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "context_length",
            "max_source_positions",
            "max_target_positions",
            "original_max_position_embeddings",
        ),
        128,
    ),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "mask_token_id": 3,
    "decoder_start_token_id": 1,
    "image_token_id": 4,
    "audio_token_id": 5,
    "video_token_id": 6,
    # windows
    **dict.fromkeys(
        (
            "sliding_window",
            "attention_chunk_size",
            "window_size",
            "attention_window_size",
            "local_attention",
            "keep_window_size",
        ),
        WINDOW,
    ),
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), 1),
    "moe_latent_size": None,
    "routed_scaling_factor": 1.5,
    # recurrences
    "mamba_d_state": 4,
    "state_size": 4,
    "ssm_state_size": 4,
    "mamba_expand": 2,
    "expand": 2,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "n_mamba_heads": 2,
    "mamba_headdim": 16,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "block_size": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    "hc_mult": 2,
    "index_block_size": 8,
    "index_topk_blocks": 2,
    # dropout, where the comparison wants none
    **dict.fromkeys(
        (
            "attention_dropout",
            "hidden_dropout",
            "dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "activation_dropout",
            "embed_dropout",
            "resid_dropout",
            "router_jitter_noise",
            "input_jitter_noise",
            "decoder_layerdrop",
            "encoder_layerdrop",
            "layerdrop",
            "lsh_attention_probs_dropout_prob",
            "local_attention_probs_dropout_prob",
            "summary_first_dropout",
            "residual_dropout",
            "dropout_p",
            "moe_router_jitter_noise",
        ),
        0.0,
    ),
    "use_mamba_kernels": False,
    "use_cache": True,
    "hash_seed": 0,
    "is_decoder": True,
}
"""A small value for every field of that name; a field that a family does not have is left out."""

LAYER_KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attn_layers", "layer_type_list",
               "hybrid_override_pattern", "indexer_types")  # fmt: skip
"""Fields that name the kind of each layer."""

_SHARED: dict[str, Any] = {  # the last two layers use the keys and values of the first two
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
_GEMMA3N: dict[str, Any] = {"activation_sparsity_pattern": [0.0, 0.0]}
REPAIRS: dict[str, dict[str, Any]] = {
    "dory": {"num_hidden_layers": 3},
    "falcon_h1": {"mamba_d_ssm": 96},
    "mamba2": {"num_heads": 6, "head_dim": 16},
    "gemma3n": _GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm3": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "gemma3n_text": _GEMMA3N | _SHARED,
    "gemma4_text": _SHARED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mpt": {"attn_pdrop": 0},
    "deepseek_v2": {"topk_group": None, "n_group": None},
    "laguna": {"num_attention_heads_per_layer": HEADS},
    "mimo_v2_flash": {"head_dim": 12},
    "dots1": {"n_shared_experts": 1},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "top_k": 1, "moe_topk": 1},
    "inkling2_loop_text": {
        "num_hidden_layers": 4,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "n_layers_per_attn_res_block": 1,
    },
    "reformer": {"axial_pos_embds_dim": [16, 32], "axial_pos_shape": [8, 16]},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "n_mamba_heads": 6,
        "num_key_value_heads": 6,
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
    },
}
"""What the generic sizes cannot know, by type."""

UNTAKEN = ("ignore_keys_at_rope_validation",)
"""Fields that a configuration has and its constructor does not take."""


MOST_PARAMETERS = 4_000_000
"""Beyond it a model is not tiny, and a check of it takes minutes."""


class CannotBuild(Exception):
    """Why there is no tiny model of a type."""


@dataclass(frozen=True)
class Family:
    """A tiny model and what to feed it."""

    kind: str
    model: nn.Module
    vocabulary: int

    def tokens(self, *shape: int, seed: int = 0) -> Tensor:
        """Draw token ids without the special ones, int64."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(8, self.vocabulary, shape, generator=generator)


def tiny_config(kind: str, **changes: Any) -> Any:
    """The default configuration of a type with small sizes.

    Raises: CannotBuild: the type has no default configuration.
    """
    config_class = CONFIG_MAPPING[kind]
    try:
        defaults = config_class()
    except Exception as error:
        raise CannotBuild(f"no default configuration: {_line(error)}") from error
    changes = {**REPAIRS.get(kind, {}), **changes}
    try:
        settings = _shrunk(defaults, {**SIZES, **changes})
        lists = {name: value for name, value in changes.items() if isinstance(value, list) and hasattr(defaults, name)}
        return config_class(**{**settings, **lists})
    except Exception as error:
        raise CannotBuild(f"its configuration refuses small sizes: {_line(error)}") from error


def _shrunk(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments: the fields of a configuration, small, and of those inside it."""
    fields = dict(vars(config))
    for computed in ("architectures", "transformers_version", "id2label", "label2id", "_name_or_path", "model_type"):
        fields.pop(computed, None)
    fields = {name: value for name, value in fields.items() if not name.startswith("_") and name not in UNTAKEN}
    sizes = dict(sizes)
    if "qk_rope_head_dim" in fields:  # multi-head latent attention: the rotary part is the "head", and heads share none
        sizes |= {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": HEADS}
    aliases = dict(getattr(type(config), "attribute_map", {}))
    for alias, name in aliases.items():
        if alias in sizes and name not in sizes and name in fields:
            fields[name] = sizes[alias]
    count = sizes["num_hidden_layers"]
    kinds = {name: fields[name] for name in LAYER_KINDS if isinstance(fields.get(name), (list, tuple))}
    chosen = _layers(kinds, count)
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, transformers.PretrainedConfig):
            inner = {key: part for key, part in sizes.items() if key not in ("architectures",)}
            result[name] = type(value)(**_shrunk(value, inner))
        elif name in kinds:
            result[name] = [value[index] for index in chosen]
        elif name in sizes and (value is not None or name in FILLED or name.startswith("linear_")):
            small = len(chosen) if kinds and SIZES.get(name) == count and name in DEPTHS else sizes[name]
            if isinstance(value, list) and not isinstance(small, list):
                small = [small] * (len(chosen) if kinds else count) if len(value) > 1 else [small]
            result[name] = small
        elif name == "rope_parameters" and isinstance(value, dict):
            result[name] = _plain_rope(value)
        else:
            result[name] = copy.deepcopy(value)
    return result


FILLED = ("head_dim", "num_key_value_heads", "sliding_window", "num_experts", "n_routed_experts", "num_local_experts",
          "num_experts_per_tok", "n_shared_experts", "topk_group", "n_group", "moe_intermediate_size")  # fmt: skip
"""Fields that a default configuration leaves empty and a model needs."""

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")


def _layers(kinds: dict[str, Any], count: int) -> list[int]:
    """The first layers of each combination of kinds, in order; at least ``count``."""
    if not kinds:
        return list(range(count))
    depth = min(len(names) for names in kinds.values())
    seen: dict[tuple[str, ...], int] = {}
    for index in range(depth):
        seen.setdefault(tuple(str(names[index]) for names in kinds.values()), index)
    chosen = sorted(seen.values())
    index = 0
    while len(chosen) < min(count, depth):
        if index not in chosen:
            chosen.append(index)
        index += 1
    return sorted(chosen)


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Keep theta and partial rotation; scaling needs lengths that a tiny model does not have."""
    if any(isinstance(part, dict) for part in parameters.values()):
        return {name: _plain_rope(part) if isinstance(part, dict) else part for name, part in parameters.items()}
    kept = {name: part for name, part in parameters.items() if name in ("rope_theta", "partial_rotary_factor")}
    if "llama_4_scaling_beta" in parameters:
        kept |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
    sections = parameters.get("mrope_section")
    if sections is not None:
        kept["mrope_section"] = [2, 1, 1]
    return {"rope_type": "default", **kept}


def tiny_family(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Family:
    """Build the tiny random model of a type with its own eager attention, in train mode, without dropout.

    Raises: CannotBuild: with the reason.
    """
    config = tiny_config(kind, **changes)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    if isinstance(model_class.config_class, type) and not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)  # a multimodal configuration whose text model this is
    torch.manual_seed(seed)
    try:
        model = model_class._from_config(config, attn_implementation="eager", experts_implementation="eager")
    except Exception as error:
        raise CannotBuild(f"{model_class.__name__}: {_line(error)}") from error
    size = sum(p.numel() for p in model.parameters())
    if size > MOST_PARAMETERS:
        raise CannotBuild(f"{model_class.__name__}: still {size:,} parameters at small sizes")
    _scatter(model)
    rotary = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    model = model.to(dtype)
    for name, buffer in model.named_buffers():  # loading a model keeps rotary tables float32; casting one does not
        if name in rotary:
            buffer.data = rotary[name]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Family(kind, model.train(), VOCABULARY)


def _scatter(model: nn.Module) -> None:
    """Move one-dimensional weights (norms, biases, sinks) off the constant they start from, so that a forgotten one
    shows; experts and other parameters that only loading fills get values; all weights are large enough to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() > 2 or not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(0.0, 0.1)
            elif parameter.std() < 0.1:
                parameter.mul_(4)
        for parameter in model.parameters():
            if not parameter.isfinite().all():
                parameter.normal_(0.0, 0.1)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
