"""Scaling of rotary position tables, so that a model reads further than it was trained (LongLoRA, section 4.1).

A rotary embedding turns pair i of a head by the angle ``position * inv_freq[i]``, with ``inv_freq[i] = theta ** (-2i /
dim)``. Beyond the native context the slow pairs reach angles they never met in training. Four remedies, all functions
of the factor ``s = context / native_context``:

    linear   every angle divided by s: nothing new is met, but neighbours look closer   (Chen et al., arXiv 2306.15595)
    ntk      theta raised so that the slowest pair is divided by s and the fastest is not          (bloc97, 2023)
    yarn     fast pairs kept, slow pairs divided by s, a ramp between; logits sharpened       (Peng et al., 2309.00071)
    theta    theta raised until the context fits the pairs that trained through a full turn (Liu et al., 2310.05209)

These are formulas, not modules: ``model/context.py`` writes the corresponding settings into a model's configuration.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RotaryScaling(NamedTuple):
    """Float32 ``[dim // 2]`` angles per position, and what cos and sin are multiplied by."""

    inv_freq: Tensor
    attention_factor: float


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """Compute unscaled angles per position, ``theta ** (-2i / dim)`` (Su et al., arXiv 2104.09864, section 3.2.2).

    Args:
        dim: rotated dimensions of a head; even.
        theta: base of the wavelengths, above 1.
    Returns: float32 ``[dim // 2]``, falling from 1.
    Raises: ValueError: ``dim`` is odd or ``theta`` not above 1.
    """
    return _inverse_frequencies(dim, theta).float()


def linear(dim: int, theta: float, *, factor: float) -> RotaryScaling:
    """Interpolate positions: all angles divided by ``factor`` (Chen et al., arXiv 2306.15595).

    Args:
        dim, theta: as in ``inverse_frequencies``.
        factor: context divided by native context, at least 1.
    Raises: ValueError: an argument is out of range.
    """
    _check_factor(factor)
    return RotaryScaling((_inverse_frequencies(dim, theta) / factor).float(), 1.0)


def ntk(dim: int, theta: float, *, factor: float) -> RotaryScaling:
    """Raise theta by the NTK-aware rule of ``ntk_theta``. Args and errors as in ``linear``."""
    return RotaryScaling(inverse_frequencies(dim, ntk_theta(dim, theta, factor=factor)), 1.0)


def ntk_theta(dim: int, theta: float, *, factor: float) -> float:
    """Find the theta that divides the slowest pair by ``factor`` exactly (YaRN, arXiv 2309.00071, section 3.1).

    ``theta * factor ** (dim / (dim - 2))``; extending twice by f and g is extending once by f * g.
    """
    _check_factor(factor)
    if dim < 4:
        raise ValueError(f"dim {dim}: NTK-aware scaling needs at least two pairs")
    return theta * factor ** (dim / (dim - 2))


def yarn(
    dim: int,
    theta: float,
    *,
    factor: float,
    native_context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> RotaryScaling:
    """Scale by parts: slow pairs as ``linear``, fast ones not at all (YaRN, arXiv 2309.00071, sections 3.2 and 3.4).

    The ramp is linear in the pair's index, as in the authors' program and every model since, not in its
    number of turns, as the paper writes it.

    Args:
        dim, theta, factor: as in ``linear``.
        native_context: tokens the model was trained on; a pair turns ``native_context * inv_freq / 2 pi`` times in it.
        beta_fast: turns above which a pair is kept; beta_slow: turns below which it is interpolated.
        truncate: round the ends of the ramp outwards to whole pairs.
    Returns: ``attention_factor`` is ``0.1 ln(factor) + 1``, the square root of the paper's 1 / t, on cos and sin alike.
    Raises: ValueError: an argument is out of range.
    """
    _check_factor(factor)
    frequencies = _inverse_frequencies(dim, theta)
    low, high = (_pair_turning(turns, dim, theta, native_context) for turns in (beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(
        0, 1
    )  # share of `linear`, [dim/2]
    scaled = frequencies * (1 - interpolated) + frequencies / factor * interpolated
    return RotaryScaling(scaled.float(), 0.1 * math.log(factor) + 1.0)


def context_theta(theta: float, *, native_context: int, context: int) -> float:
    """Find the theta at which a longer context keeps the turns met in training (Liu et al., arXiv 2310.05209).

    The pairs that trained through a full turn have a wavelength below ``native_context``; the critical base is the
    theta at which as many pairs have one below ``context``:

        ln theta' / ln theta = ln(context / 2 pi) / ln(native_context / 2 pi)

    Extending twice is extending once to the longer context.

    Args:
        theta: that the model was trained with.
        native_context, context: tokens; ``native_context`` at least 7, ``context`` not below it.
    Raises: ValueError: an argument is out of range.
    """
    if theta <= 1 or native_context <= 2 * math.pi or context < native_context:
        raise ValueError(
            f"theta {theta}, native_context {native_context}, context {context}: theta must be above 1, native_context"
            " above 2 pi, context not below native_context"
        )
    return theta ** (math.log(context / (2 * math.pi)) / math.log(native_context / (2 * math.pi)))


def _inverse_frequencies(dim: int, theta: float) -> Tensor:
    if dim < 2 or dim % 2:
        raise ValueError(f"dim {dim}: must be even and at least 2, a rotary embedding turns pairs")
    if theta <= 1:
        raise ValueError(f"theta {theta}: must be above 1")
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _pair_turning(turns: float, dim: int, theta: float, native_context: int) -> float:
    """Index (not whole) of the pair that turns so often within the native context; solves turns = n inv_freq / 2 pi."""
    return dim * math.log(native_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _check_factor(factor: float) -> None:
    if not factor >= 1:
        raise ValueError(f"factor {factor}: must be at least 1, the new context divided by the native one")
