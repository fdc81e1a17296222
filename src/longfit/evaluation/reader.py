"""A model that has read something: its keys and values stay, and what two texts share is read once.

    reader = Reader(model)
    logits = reader.read(document + question)         [1, V]: what comes next
    logits = reader.read(document + another)          only ``another`` is read

Reading goes in chunks, so that a long document needs the activations of one chunk and the keys and values of all; those
are what a token costs. Attention is exact. Two prompts may share any number of first tokens; nothing else is guessed.
Keys and values lie in storage with room for more, so that one more token does not copy all those before it.

Not here: sampling (``generate.py``), and measuring a window of given text (``perplexity.py``), which needs no cache.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from longfit.engine.hf_model import base_model, output_head
from longfit.errors import DataError, ModelError
from longfit.evaluation.evaluation_mode import measured, require_known

CHUNK_TOKENS = 2048
"""Tokens read at once: enough for full speed of the matmuls, and for SmolLM2-135M about 60 MB of activations."""


ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative difference of logits that reading in another order may cause; 1e-4 in wider dtypes. A layer that forgets
what it has read changes them by tens of per cent."""


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, as the first tokens of larger storage; cropping keeps the storage."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, K, t, D] and return all [B, K, n, D], as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.storage = [key_states[:, :, :0], value_states[:, :, :0]]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for index, new in enumerate((key_states, value_states)):
            if end > self.storage[index].shape[2]:
                wider = new.new_empty(*new.shape[:2], max(end, start * 5 // 4), new.shape[3])
                wider[:, :, :start] = self.storage[index][:, :, :start]
                self.storage[index] = wider
            self.storage[index][:, :, start:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.storage)
        return self.keys, self.values


class Reader:
    """See the module. One text at a time; reading another keeps what the two share."""

    def __init__(self, model: nn.Module, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        """Begin with nothing read.

        Args:
            model: a transformers causal language model, or a PeftModel around one.
            chunk_tokens: read at once.
        """
        self.model, self.chunk_tokens = model, chunk_tokens
        self.num_words, self.device = output_head(model).weight.shape[0], output_head(model).weight.device
        self.token_ids = torch.zeros(0, dtype=torch.int64)
        self.cache = _empty_cache(model)
        self.continues = not isinstance(self.cache, DynamicCache) or self._continues_in_chunks()

    def read(self, token_ids: Tensor, *, keep: int = 1, on_progress: Callable[[int, int], Any] | None = None) -> Tensor:
        """Read tokens, reusing what the last text began with.

        Args:
            token_ids: int64 ``[N]``.
            keep: positions at the end whose logits are wanted.
            on_progress: called after each chunk with tokens read and tokens in all.
        Returns: float32 (float64 for float64) ``[keep, V]``; the last row is about the token after the last.
        Raises: DataError: no tokens, or tokens that the model does not know.
        """
        if not 1 <= keep <= len(token_ids):
            raise DataError(f"{len(token_ids)} tokens: too few to read and to predict {keep} from; give more text")
        require_known(token_ids, self.num_words)
        token_ids = token_ids.to("cpu", torch.int64)
        first_kept = len(token_ids) - keep
        done = min(shared_prefix(self.token_ids, token_ids), first_kept)
        if done < len(self.token_ids) and not _forgets(self.cache):
            done = 0  # a recurrent state cannot go back to an earlier token: all is read again
        if not self.continues and len(token_ids) - done > 1:
            done = 0
        self._forget_after(done)
        kept = []
        with measured(self.model):
            while done < len(token_ids):
                end = min(done + self.chunk_tokens, len(token_ids)) if self.continues else len(token_ids)
                wanted = end - max(done, min(end, first_kept))
                kept_here = max(1, wanted)
                logits = self.model(
                    input_ids=token_ids[None, done:end].to(self.device),
                    past_key_values=self.cache,
                    use_cache=True,
                    **self._keep(end - done, kept_here),
                ).logits[0, -kept_here:]
                if wanted:
                    kept.append(logits.to(torch.promote_types(logits.dtype, torch.float32)))
                done = end
                self.token_ids = token_ids[:done]
                if on_progress is not None:
                    on_progress(done, len(token_ids))
        return torch.cat(kept)

    def _continues_in_chunks(self) -> bool:
        """Whether a second chunk goes on from the state of the first, tried on six tokens: some layers begin anew.

        Raises: ModelError: not even a single token goes on from it.
        """
        ids = torch.arange(6, device=self.device)[None] % self.num_words
        with measured(self.model):
            whole = self.model(input_ids=ids, use_cache=False).logits[0, -1]
            found = []
            for cut in (3, 5):
                cache = _empty_cache(self.model)
                for part in (ids[:, :cut], ids[:, cut:]):
                    last = self.model(input_ids=part, past_key_values=cache, use_cache=True).logits[0, -1]
                found.append(bool((last - whole).norm() <= ROUNDING.get(whole.dtype, 1e-4) * whole.norm()))
        if not found[1]:
            raise ModelError(
                f"{type(base_model(self.model)).__name__} does not go on from its cache: a token after five read gives"
                " other logits than six tokens read at once; longfit cannot talk to this model"
            )
        return found[0]

    def _keep(self, num_tokens: int, wanted: int) -> dict[str, Tensor]:
        """Which logits to make: positions, as a number would let some families drop tokens in their upper layers."""
        if "logits_to_keep" not in inspect.signature(base_model(self.model).forward).parameters:
            return {}
        return {"logits_to_keep": torch.arange(num_tokens - wanted, num_tokens, device=self.device)}

    def _forget_after(self, num_tokens: int) -> None:
        surplus = len(self.token_ids) - num_tokens
        if num_tokens == 0:
            self.cache = _empty_cache(self.model)
        elif surplus:
            for layer in self.cache.layers:
                layer.crop(-surplus)
        self.token_ids = self.token_ids[:num_tokens]


def shared_prefix(one: Tensor, other: Tensor) -> int:
    """How many first tokens two texts have in common."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0]) if len(differ) else length


def _empty_cache(model: nn.Module) -> Cache:
    """Roomy layers where a model only attends; its own kind of cache where some layers keep a state."""
    own = DynamicCache(config=base_model(model).config.get_text_config(decoder=True))
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in own.layers):
        return Cache(layer_class_to_replicate=RoomyLayer)
    return own


def _forgets(cache: Cache) -> bool:
    """Whether the last tokens can be taken out of a cache again."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)
