"""A model that has read something: its keys and values stay, and what two texts share is read once.

    reader = Reader(model)
    logits = reader.read(document + question)         [1, V]: what comes next
    logits = reader.read(document + another)          only ``another`` is read

Reading goes in chunks, so that a long document needs the activations of one chunk and the keys and values of all; those
are what a token costs. Attention is exact. Two prompts may share any number of first tokens; nothing else is guessed.
Keys and values lie in storage with room for more, so that one more token does not copy all those before it.

How a model goes on from what it has read is not believed but tried on six tokens (``WAYS``); the fastest way that gives
what reading at once gives is used, and one that is slow is said.

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
from longfit.notice import notify

CHUNK_TOKENS = 2048
"""Tokens read at once: enough for full speed of the matmuls, and for SmolLM2-135M about 60 MB of activations."""

ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative difference of logits that reading in another order may cause; 1e-4 in wider dtypes. A layer that forgets
what it has read changes them by tens of per cent."""

WAYS = {
    "roomy": "keys and values in storage with room, from which the last tokens can be taken out again",
    "own": "the model's own cache; a text that goes back is read again",
    "single": "the model's own cache, one token at a time after the first reading",
    "none": "no cache: the whole text is read for every token",
}
"""How what has been read is kept, the fastest first."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""What models call their cache, in the call and in what it returns; which one, the signature says."""

NUM_TRIED = 6
"""Tokens of the trial."""


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
    """See the module. One text at a time; reading another keeps what the two share.

    Attributes:
        way: one of ``WAYS``.
        token_ids: what has been read, int64 ``[N]``.
        cache: what is kept of it.
    """

    def __init__(self, model: nn.Module, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        """Begin with nothing read.

        Args:
            model: a transformers causal language model, or a PeftModel around one.
            chunk_tokens: read at once.
        Raises: ModelError: the model does not run.
        """
        self.model, self.chunk_tokens = model, chunk_tokens
        self.num_words, self.device = output_head(model).weight.shape[0], output_head(model).weight.device
        parameters = inspect.signature(base_model(model).forward).parameters
        self._cache_name = next((name for name in CACHE_NAMES if name in parameters), None)
        self._keeps = "logits_to_keep" in parameters
        self.way = "none"
        self.cache: Any = None
        self.token_ids = torch.zeros(0, dtype=torch.int64)
        self.way = self._choose()
        self._forget_after(0)

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
        done = self._reused(token_ids, first_kept)
        self._forget_after(done)
        kept = []
        with measured(self.model):
            while done < len(token_ids):
                end = self._next_end(done, len(token_ids))
                wanted = end - max(done, min(end, first_kept))
                logits = self._step(token_ids[done:end], max(1, wanted))
                if wanted:
                    kept.append(logits.to(torch.promote_types(logits.dtype, torch.float32)))
                done = end
                self.token_ids = token_ids[:done]
                if on_progress is not None:
                    on_progress(done, len(token_ids))
        return torch.cat(kept)

    def _reused(self, token_ids: Tensor, first_kept: int) -> int:
        """First tokens that need not be read again."""
        done = min(shared_prefix(self.token_ids, token_ids), first_kept)
        return done if self.way == "roomy" or (self.way != "none" and done == len(self.token_ids)) else 0

    def _next_end(self, done: int, num_tokens: int) -> int:
        if self.way == "none" or (self.way == "single" and done == 0):
            return num_tokens
        return min(done + (1 if self.way == "single" else self.chunk_tokens), num_tokens)

    def _step(self, token_ids: Tensor, wanted: int) -> Tensor:
        """Read some tokens after those that are kept; their last logits ``[wanted, V]``."""
        given: dict[str, Any] = {"use_cache": False} if self.way == "none" else {"use_cache": True}
        if self.way != "none" and self._cache_name is not None:
            given[self._cache_name] = self.cache
        if self._keeps:  # positions, as a number would let some families drop tokens in their upper layers
            given["logits_to_keep"] = torch.arange(len(token_ids) - wanted, len(token_ids), device=self.device)
        out = self.model(input_ids=token_ids[None].to(self.device), **given)
        if self.way in ("own", "single"):
            assert self._cache_name is not None, "a way that needs one"
            self.cache = getattr(out, self._cache_name)
        logits: Tensor = out.logits[0, -wanted:]
        return logits

    def _choose(self) -> str:
        """The fastest way that gives, on six tokens, what reading at once gives.

        Raises: ModelError: the model does not run.
        """
        ids = (torch.arange(NUM_TRIED) + 8) % self.num_words
        with measured(self.model):
            try:
                whole = self._step(ids, 1)
            except Exception as error:
                name = type(base_model(self.model)).__name__
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ModelError(f"{name} does not read a text of {NUM_TRIED} tokens: {reason}") from error
            possible = () if self._cache_name is None else ("roomy", "own", "single")
            for way in possible:
                if (way != "roomy" or _only_attends(self.model)) and self._agrees(way, ids, whole):
                    break
            else:
                way = "none"
        if way in ("single", "none"):
            notify(f"{type(base_model(self.model)).__name__} does not go on from its cache in chunks: {WAYS[way]}")
        return way

    def _agrees(self, way: str, ids: Tensor, whole: Tensor) -> bool:
        """Try a way: two readings, and, where tokens can be taken out again, a third that goes back."""
        self.way, found = way, []
        try:
            for cut in (5,) if way == "single" else (3,):
                self._forget_after(0)
                self._step(ids[:cut], 1)
                found.append(self._step(ids[cut:], 1))
            if way == "roomy":
                self.token_ids = ids
                self._forget_after(2)
                found.append(self._step(ids[2:], 1))
        except Exception:  # in whatever way a model fails with a cache that it does not know
            return False
        finally:
            self.token_ids = ids[:0]
        allowed = ROUNDING.get(whole.dtype, 1e-4) * whole.norm()
        return all(bool((last - whole).norm() <= allowed) for last in found)

    def _forget_after(self, num_tokens: int) -> None:
        surplus = len(self.token_ids) - num_tokens
        if num_tokens == 0:
            self.cache = Cache(layer_class_to_replicate=RoomyLayer) if self.way == "roomy" else None
        elif surplus:
            for layer in self.cache.layers:
                layer.crop(-surplus)
        self.token_ids = self.token_ids[:num_tokens]


def shared_prefix(one: Tensor, other: Tensor) -> int:
    """How many first tokens two texts have in common."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0]) if len(differ) else length


def _only_attends(model: nn.Module) -> bool:
    """Whether a model's cache is keys and values alone, so far as its configuration says."""
    own = DynamicCache(config=base_model(model).config.get_text_config(decoder=True))
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in own.layers)
