"""Which model families can be written as GGUF, and what llama.cpp must be told about each.

A GGUF file has an architecture name, numbers under keys that begin with it, and tensors whose names and layouts are
llama.cpp's own. Three things differ from transformers:

- The Llama architecture rotates neighbouring pairs of a head's values where transformers rotates halves, so the rows of
  its query and key matrices are interleaved.
- Gemma's norms multiply by ``1 + w`` in transformers; in the file stands ``1 + w``.
- Llama-3's scaled frequencies and Phi-3's long and short ones are not numbers but tensors of factors.

What llama.cpp computes in another way than the model's configuration asks for is refused before any work: a file that
opens and speaks nonsense is the worst result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGUFValueType, Keys
from torch import Tensor

from longfit.errors import ExportError
from longfit.model.gguf_config import gemma_query_scalar

U32, F32, STRING, BOOL = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.BOOL


@dataclass(frozen=True)
class GgufField:
    """A value of a GGUF file's metadata."""

    value: Any
    kind: GGUFValueType
    item_kind: GGUFValueType | None = None


@dataclass(frozen=True)
class GgufFamily:
    """How transformers' tensors of a family become llama.cpp's.

    Attributes:
        architecture: GGUF's name for it.
        interleaved: query and key rows are interleaved.
        norm_offset: added to the weights of norms.
        activation: the config key of the MLP's activation, and the names under which it is llama.cpp's.
    """

    architecture: str
    interleaved: bool = False
    norm_offset: float = 0.0
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu", "swish"))


_GELU = ("hidden_activation", ("gelu_pytorch_tanh",))
FAMILIES = {
    "llama": GgufFamily("llama", interleaved=True),  # SmolLM and SmolLM2 too
    "mistral": GgufFamily("llama", interleaved=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma2": GgufFamily("gemma2", norm_offset=1.0, activation=_GELU),
    "gemma3_text": GgufFamily("gemma3", norm_offset=1.0, activation=_GELU),
    "phi3": GgufFamily("phi3"),
}


def family_of(config: Any) -> GgufFamily:
    """The family of a model's configuration.

    Raises: ExportError: not one that can be written as GGUF, or one of its settings means something that llama.cpp does
        not compute.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ExportError(
            f"{config.model_type}: longfit writes GGUF for {', '.join(FAMILIES)}; merge it with longfit merge and use "
            "llama.cpp's own converter"
        )
    problems = list(_problems(config, family))
    if problems:
        raise ExportError(f"{config.model_type}: llama.cpp computes this model in another way: {'; '.join(problems)}")
    return family


def _problems(config: Any, family: GgufFamily) -> Iterator[str]:
    key, names = family.activation
    if getattr(config, key) not in names:
        yield f"{key} is {getattr(config, key)!r}, it has {names[0]!r} only"
    kinds = [kind == "full_attention" for kind in getattr(config, "layer_types", None) or []]
    if family.architecture in ("qwen2", "qwen3") and not all(kinds):
        yield "some layers have a sliding window, it reads them all whole"
    period = {"gemma2": 2, "gemma3": 6}.get(family.architecture)
    if period is not None:
        if kinds != [(index + 1) % period == 0 for index in range(len(kinds))]:
            yield f"layer_types: every layer but each {period}th must have the sliding window"
        expected = gemma_query_scalar(config)
        if config.query_pre_attn_scalar != expected:
            yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, it divides by {expected}"
    if family.architecture == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        yield "soft caps are switched off, it always has them"
    yield from _rope_problems(full_rope(config), config)


def full_rope(config: Any) -> dict[str, Any]:
    """The rotary settings; those of the layers with full attention where they differ."""
    parameters = config.rope_parameters
    return dict(parameters.get("full_attention", parameters))


def _rope_problems(rope: dict[str, Any], config: Any) -> Iterator[str]:
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        yield f"positions are scaled by {kind!r}"
    if kind == "yarn":
        factor = float(rope["factor"])
        given = rope.get("attention_factor")
        if given is not None and not math.isclose(given, 0.1 * math.log(factor) + 1.0, rel_tol=1e-6):
            yield f"attention_factor is {given}, it has 0.1 ln(factor) + 1"
        for key in ("mscale", "mscale_all_dim"):
            if rope.get(key) is not None:
                yield f"{key} is {rope[key]}"
        if rope.get("truncate") is False:
            yield "truncate is False, it rounds the correction range"
    if kind == "longrope" and config.model_type != "phi3":
        yield "positions are scaled by 'longrope', which it has for phi3 only"


def metadata(config: Any, family: GgufFamily) -> dict[str, GgufField]:
    """Everything under the architecture's name that follows from a configuration."""
    heads, head_dim = config.num_attention_heads, head_size(config)
    sizes: dict[str, GgufField | None] = {
        Keys.LLM.CONTEXT_LENGTH: GgufField(int(config.max_position_embeddings), U32),
        Keys.LLM.EMBEDDING_LENGTH: GgufField(config.hidden_size, U32),
        Keys.LLM.BLOCK_COUNT: GgufField(config.num_hidden_layers, U32),
        Keys.LLM.FEED_FORWARD_LENGTH: GgufField(config.intermediate_size, U32),
        Keys.LLM.VOCAB_SIZE: GgufField(config.vocab_size, U32),
        Keys.Attention.HEAD_COUNT: GgufField(heads, U32),
        Keys.Attention.HEAD_COUNT_KV: GgufField(getattr(config, "num_key_value_heads", None) or heads, U32),
        Keys.Attention.KEY_LENGTH: GgufField(head_dim, U32),
        Keys.Attention.VALUE_LENGTH: GgufField(head_dim, U32),
        Keys.Attention.LAYERNORM_RMS_EPS: GgufField(float(config.rms_norm_eps), F32),
        Keys.Attention.SLIDING_WINDOW: _sliding_window(config, family),
        Keys.LLM.ATTN_LOGIT_SOFTCAPPING: _positive(config, "attn_logit_softcapping", family, "gemma2"),
        Keys.LLM.FINAL_LOGIT_SOFTCAPPING: _positive(config, "final_logit_softcapping", family, "gemma2", "gemma3"),
        **rope_metadata(config),
    }
    return {key.format(arch=family.architecture): field for key, field in sizes.items() if field is not None}


def rope_metadata(config: Any) -> dict[str, GgufField | None]:
    """The part of the metadata that an extension of the context changes."""
    rope, local = full_rope(config), config.rope_parameters.get("sliding_attention")
    kind = rope["rope_type"]
    scaled = kind in ("linear", "yarn")
    original = rope.get("original_max_position_embeddings") if kind in ("yarn", "longrope") else None
    return {
        Keys.Rope.DIMENSION_COUNT: GgufField(rotated_size(config), U32),
        Keys.Rope.FREQ_BASE: GgufField(float(rope["rope_theta"]), F32),
        Keys.Rope.FREQ_BASE_SWA: GgufField(float(local["rope_theta"]), F32) if local else None,
        Keys.Rope.SCALING_TYPE: GgufField(kind, STRING) if scaled else None,
        Keys.Rope.SCALING_FACTOR: GgufField(float(rope["factor"]), F32) if scaled else None,
        Keys.Rope.SCALING_ORIG_CTX_LEN: GgufField(int(original), U32) if original else None,
        Keys.Rope.SCALING_YARN_BETA_FAST: _given(rope, "beta_fast", kind),
        Keys.Rope.SCALING_YARN_BETA_SLOW: _given(rope, "beta_slow", kind),
        Keys.Rope.SCALING_ATTN_FACTOR: GgufField(_longrope_attention(config), F32) if kind == "longrope" else None,
    }


def _given(rope: dict[str, Any], key: str, kind: str) -> GgufField | None:
    return GgufField(float(rope[key]), F32) if kind == "yarn" and rope.get(key) is not None else None


def _longrope_attention(config: Any) -> float:
    rope = full_rope(config)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    scale = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def _positive(config: Any, key: str, family: GgufFamily, *architectures: str) -> GgufField | None:
    value = getattr(config, key, None)
    return GgufField(float(value), F32) if value and family.architecture in architectures else None


def _sliding_window(config: Any, family: GgufFamily) -> GgufField | None:
    if family.architecture in ("gemma2", "gemma3"):
        return GgufField(int(config.sliding_window), U32)
    if family.architecture == "phi3":
        return GgufField(int(config.sliding_window or 0), U32)
    return None


def head_size(config: Any) -> int:
    """Values of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotated_size(config: Any) -> int:
    """Values of a head that rotate."""
    return int(head_size(config) * full_rope(config).get("partial_rotary_factor", 1.0))


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Factors that divide the rotary frequencies, float32, under GGUF's names."""
    rope = full_rope(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, rotated_size(config))}
    if rope["rope_type"] == "longrope":
        return {
            "rope_factors_long.weight": torch.tensor(rope["long_factor"], dtype=torch.float32),
            "rope_factors_short.weight": torch.tensor(rope["short_factor"], dtype=torch.float32),
        }
    return {}


def llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """What Llama-3.1 divides each frequency by, ``[size / 2]``: 1 for the high ones, ``factor`` for the low ones."""
    frequencies = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).float()


def warnings_of(config: Any, family: GgufFamily) -> list[str]:
    """What the user of the file should know."""
    window = getattr(config, "sliding_window", None)
    if family.architecture == "llama" and window and window < config.max_position_embeddings:
        return [
            f"the model has a sliding window of {window:,} tokens, which llama.cpp does not apply to it: longer texts "
            "are read with full attention"
        ]
    return []


def to_gguf(name: str, tensor: Tensor, config: Any, family: GgufFamily) -> Tensor:
    """A tensor of the model as it stands in the file, float32 where it changes."""
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor.float() + family.norm_offset
    if family.interleaved and ".q_proj." in name:
        return interleave(tensor, config.num_attention_heads)
    if family.interleaved and ".k_proj." in name:
        return interleave(tensor, config.num_key_value_heads)
    return tensor


def interleave(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows ``[H * D, ...]`` of each head from (first half, second half) to pairs."""
    heads = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)
