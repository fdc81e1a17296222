"""How far the demo goes in the time it promises: its context and steps, from a few seconds of measuring here.

A forward pass is a number of seconds a token for everything but attention, plus attention, which grows with the pairs
of a query and a key that it sees. Both are measured: the model reads a short text, and the attention that a run would
use is timed alone. A training step runs everything but attention forward, forward again and backward, and multiplies
in attention nine times for each pair where a forward pass multiplies twice.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from longfit.attention.limits import quarter_of
from longfit.evaluation.perplexity import perplexity
from longfit.planning.measure import measure_attention

WARM_UP_TOKENS, PROBE_TOKENS = 256, 2048
"""Read before the clock starts, and on it. Fewer would be slower a token than a document is: their tile is not full."""

PASSES = 3
"""A training step's forward, recomputed forward and backward through frozen weights, in forward passes."""

LOADS = 2
"""Times that the model is still loaded when the choice is made: to train it, and to evaluate what was trained."""

FIXED_S = 15.0
"""An allowance, not a measurement: packing text, drawing, saving."""

CHOICES = ((14_336, 4), (12_288, 4), (14_336, 2), (12_288, 2), (12_288, 1))
"""Context and steps, the best first. Up to 10,240 tokens the base reads on as if nothing were, so that a shorter demo
would show no wall; two steps see each of the two texts once."""


@dataclass(frozen=True)
class Speed:
    """What this machine does with the model.

    Attributes:
        load_s: seconds that loading the model took.
        token_s: seconds a token of a forward pass takes besides attention.
        attention_flops: operations a second of attention.
        pair_flops: operations of all layers for one pair of a query and a key in one product.
    """

    load_s: float
    token_s: float
    attention_flops: float
    pair_flops: float

    def seconds(self, *, context: int, steps: int, group_size: int) -> float:
        """Seconds that are ahead: three evaluations with exact attention, and the training with shifted."""
        exact, shifted = context**2 / 2, context * group_size / 2  # pairs
        evaluation = context * self.token_s + 2 * exact * self.pair_flops / self.attention_flops
        step = PASSES * context * self.token_s + 9 * shifted * self.pair_flops / self.attention_flops
        return LOADS * self.load_s + FIXED_S + 3 * evaluation + steps * step


def measure_speed(model: Any, token_ids: torch.Tensor, *, load_s: float) -> Speed:
    """Time the model on the first tokens of a text, and attention alone.

    Args:
        model: as the demo loads it.
        token_ids: int64 ``[T]``, at least ``PROBE_TOKENS``.
        load_s: seconds that loading it took.
    """
    config = model.config
    for num_tokens in (WARM_UP_TOKENS, PROBE_TOKENS):
        began = time.perf_counter()
        perplexity(model, token_ids[:num_tokens], window=num_tokens, stride=num_tokens)
        seconds = time.perf_counter() - began
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    embedding = model.get_input_embeddings().weight
    return Speed(
        load_s=load_s,
        token_s=seconds / PROBE_TOKENS,
        attention_flops=measure_attention(embedding.device, embedding.dtype),
        pair_flops=2.0 * width * config.num_hidden_layers,
    )


def choose(speed: Speed, *, within_s: float) -> tuple[int, int]:
    """The context and steps of the best demo that is over in time, or the shortest if none is."""
    for context, steps in CHOICES:
        if speed.seconds(context=context, steps=steps, group_size=group_of(context)) <= within_s:
            return context, steps
    return CHOICES[-1]


def group_of(context: int) -> int:
    """Tokens in a group of shifted attention: a quarter of the context, even (LongLoRA, section 3.2)."""
    return quarter_of(context)
