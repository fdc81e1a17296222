"""The rotary positions that a GGUF file says its model has: transformers reads the base frequency and leaves the rest.

    rope.scaling.type linear, yarn     a factor, the original context, YaRN's bands
    rope_freqs.weight                  what each frequency is divided by (Llama-3.1)
    rope_factors_long, _short          the same for long and for short texts (Phi-3)

A model with other positions than its file's speaks nonsense behind its original context, and says nothing about it. So
what is not understood in full is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor

from longfit.errors import ModelError
from longfit.files.gguf_header import read_header

ORIGINAL_CONTEXT = 8192  # of Llama-3; only its product with the bands has a meaning
EXACT = 1e-4  # of factors, which are written in float32 after powers and divisions
NEUTRAL = {"attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}


def read_positions(path: Path, config: Any) -> None:
    """Put a file's scaling of positions into the configuration that transformers made of the rest.

    Raises: ModelError: a scaling that transformers does not have in this form.
    """
    keys = read_header(path).keys
    architecture = keys.get("general.architecture")
    scaling = {
        key.removeprefix(f"{architecture}.rope.scaling."): value
        for key, value in keys.items()
        if key.startswith(f"{architecture}.rope.scaling.")
    }
    tables = _tables(path)
    rope: dict[str, Any] = _full(config)
    if "rope_factors_long.weight" in tables:
        found = _longrope(tables, scaling, config)
    elif "rope_freqs.weight" in tables:
        found = llama3_of(tables["rope_freqs.weight"].double(), theta=float(rope["rope_theta"]), name=str(path))
    else:
        found = _by_type(str(path), scaling)
    rope.update(found)


def _full(config: Any) -> dict[str, Any]:
    """The settings of the layers with full attention, in place."""
    parameters: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = parameters.get("full_attention", parameters)
    return full


def _tables(path: Path) -> dict[str, Tensor]:
    names = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    tensors = read_header(path).tensors
    if not any(name in tensors for name in names):
        return {}
    return {t.name: torch.from_numpy(t.data.copy()).float() for t in GGUFReader(str(path)).tensors if t.name in names}


def _by_type(path: str, scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = scaling.get("type", "none")
    odd = [f"{key} {scaling[key]}" for key, value in NEUTRAL.items() if key in scaling and scaling[key] != value]
    if kind not in ("none", "linear", "yarn") or (odd and kind == "yarn"):
        what = f"rope.scaling.type {kind!r}" if kind not in ("none", "linear", "yarn") else f"rope.scaling.{odd[0]}"
        raise ModelError(f"{path}: {what}: positions that transformers does not have; give the original model")
    if kind == "none":
        return {}
    found = {"rope_type": kind, "factor": float(scaling.get("factor", 1.0))}
    if kind == "yarn":
        bands = {"beta_fast": scaling.get("yarn_beta_fast"), "beta_slow": scaling.get("yarn_beta_slow")}
        found |= {key: float(value) for key, value in bands.items() if value is not None}
        if "original_context_length" in scaling:
            found["original_max_position_embeddings"] = int(scaling["original_context_length"])
    return found


def _longrope(tables: Mapping[str, Tensor], scaling: Mapping[str, Any], config: Any) -> dict[str, Any]:
    original = int(scaling.get("original_context_length", config.max_position_embeddings))
    config.original_max_position_embeddings = original
    return {
        "rope_type": "longrope",
        "long_factor": tables["rope_factors_long.weight"].tolist(),
        "short_factor": tables["rope_factors_short.weight"].tolist(),
        "original_max_position_embeddings": original,
        "factor": config.max_position_embeddings / original,
        **({"attention_factor": float(scaling["attn_factor"])} if "attn_factor" in scaling else {}),
    }


def llama3_of(factors: Tensor, *, theta: float, name: str) -> dict[str, Any]:
    """The Llama-3.1 settings whose frequencies are divided by ``factors`` ``[D / 2]``, float64.

    Low frequencies are divided by the largest factor, high ones not at all, and between two bands one over the factor
    goes in a straight line with the frequency. A line has two numbers and the settings three, so the original context
    is taken as Llama-3's and the bands follow.

    Raises: ModelError: other factors than such settings make.
    """
    factor = float(factors.max())
    if factor == 1.0:
        return {}
    size = 2 * len(factors)
    turns = ORIGINAL_CONTEXT * theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size) / (2 * math.pi)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > EXACT) & (smooth < 1 - EXACT)
    below, above = turns[smooth <= EXACT], turns[smooth >= 1 - EXACT]
    low, high = float(below.max()) if len(below) else 0.0, float(above.min()) if len(above) else float(turns.max()) * 2
    x, y = turns[between], smooth[between]
    if len(x) == 1:  # of all lines through the point, one that bends before its neighbours
        low = max(low, float((x - y * high) / (1 - y)))
        high = low + float((x - low) / y)
    elif len(x) > 1:
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        low = float(x.mean() - y.mean() / slope)
        high = low + 1 / slope
    made = 1 / ((1 - ((turns - low) / (high - low)).clamp(0, 1)) * (1 / factor - 1) + 1)
    if not torch.allclose(made, factors, rtol=EXACT, atol=0):
        raise ModelError(f"{name}: rope_freqs.weight: factors that no llama3 settings make; give the original model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }
