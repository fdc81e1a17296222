"""Continue a text, or talk about a long document, with exact attention and nothing cut.

    for piece in generate(Reader(model), tokenizer, token_ids, max_new_tokens=200): print(piece, end="")

    talk = Conversation(model, tokenizer, document=text)
    for piece in talk.ask("Who wrote this?"): print(piece, end="")

A prompt that does not fit the model's context, with room for the answer, is refused with its numbers: a document that
is cut in silence gives answers about another document. What has been read once (``reader.py``) is not read again, so a
second question costs its own tokens. Text comes out piece by piece, never half a character.

Not here: batches, beams, speculation. Training never comes here either.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longfit.data.encoding import encode_prompt
from longfit.data.template import choose_template
from longfit.engine.hf_model import base_model
from longfit.errors import ConfigError, ContextError
from longfit.evaluation.reader import Reader
from longfit.evaluation.tokens import decode, encode

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not yet a character


def generate(
    reader: Reader,
    tokenizer: Any,
    token_ids: Tensor,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | None = None,
    on_progress: Callable[[int, int], Any] | None = None,
) -> Iterator[str]:
    """Continue a prompt until the model ends it.

    Args:
        reader: the model, with what it has read.
        tokenizer: its own.
        token_ids: int64 ``[N]``, the prompt.
        max_new_tokens: the end at the latest.
        temperature: 0 takes the likeliest token; higher flattens the distribution that is drawn from.
        top_p: draw among the likeliest tokens that together have this probability.
        seed: of the draws.
        stop: text before which the continuation ends.
        on_progress: called while the prompt is read, with tokens read and tokens in all.
    Yields: pieces of text; joined, they are the continuation.
    Raises: ContextError: prompt and answer do not fit. ConfigError: impossible sampling. DataError: as ``Reader.read``.
    """
    _check_sampling(max_new_tokens, temperature, top_p)
    require_space(len(token_ids), max_new_tokens, context_of(reader.model))
    ends, draw = end_tokens(reader.model, tokenizer), torch.Generator().manual_seed(seed)
    made: list[int] = []
    shown = 0
    logits = reader.read(token_ids, on_progress=on_progress)[0]
    while True:
        token = _choose(logits, temperature, top_p, draw)
        ended = token in ends
        if not ended:
            made.append(token)
        ended = ended or len(made) == max_new_tokens
        text = decode(tokenizer, made)
        if stop is not None and stop in text:
            ended, text = True, text[: text.index(stop)]
        end = len(text) if ended else _settled(text, stop)
        if end > shown:
            yield text[shown:end]
            shown = end
        if ended:
            return
        logits = reader.read(torch.cat([token_ids, torch.tensor(made, dtype=torch.int64)]))[0]


class Conversation:
    """Questions and answers about a document, or about nothing in particular.

    With a chat template the document is the begin of the first message; a model without one sees ``Question:`` and
    ``Answer:`` after it.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, document: str | None = None) -> None:
        """Begin; nothing is read before the first question.

        Args:
            model: a transformers causal language model, or a PeftModel around one.
            tokenizer: its own.
            document: what the questions are about, whole.
        """
        self.reader, self.tokenizer, self.document = Reader(model), tokenizer, document
        self.turns: list[tuple[str, str]] = []

    @property
    def context(self) -> int:
        """Tokens that the model takes."""
        return context_of(self.reader.model)

    def prompt(self, question: str) -> Tensor:
        """The whole conversation with one more question, as tokens ``[N]``."""
        document = "" if self.document is None else self.document.rstrip() + "\n\n"
        if not self.tokenizer.chat_template:
            past = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in self.turns)
            return encode(self.tokenizer, f"{document}{past}Question: {question}\nAnswer:")
        messages = []
        for asked, answer in [*self.turns, (question, "")]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        messages[0]["content"] = document + messages[0]["content"]
        ids = encode_prompt(messages[:-1], self.tokenizer, template=choose_template(self.tokenizer))
        return torch.from_numpy(ids.astype("int64"))

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_progress: Callable[[int, int], Any] | None = None,
    ) -> Iterator[str]:
        """Answer a question; the answer joins the conversation when its last piece has been taken.

        Args: those of `generate`.
        Yields: pieces of the answer.
        Raises: ContextError: document, conversation and answer do not fit the context. Others: as `generate`.
        """
        pieces = []
        for piece in generate(
            self.reader,
            self.tokenizer,
            self.prompt(question),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=None if self.tokenizer.chat_template else "\nQuestion:",
            on_progress=on_progress,
        ):
            pieces.append(piece)
            yield piece
        self.turns.append((question, "".join(pieces).strip()))


def context_of(model: nn.Module) -> int:
    """Tokens that a model takes, extended or not."""
    return int(base_model(model).config.get_text_config().max_position_embeddings)


def require_space(num_prompt: int, max_new_tokens: int, context: int) -> None:
    """Raise ContextError unless a prompt and its answer fit."""
    if num_prompt + max_new_tokens <= context:
        return
    missing = num_prompt + max_new_tokens - context
    advice = f"allow an answer of at most {context - num_prompt:,} tokens, or " if num_prompt < context else ""
    raise ContextError(
        f"the text has {num_prompt:,} tokens and the answer may take {max_new_tokens:,}: {missing:,} more than the"
        f" model's context of {context:,}; nothing is cut in silence: {advice}give a shorter text, or train a model for"
        f" a context of {num_prompt + max_new_tokens:,}"
    )


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a text, for the tokenizer and for the model's generation settings."""
    generation = base_model(model).generation_config
    found = generation.eos_token_id if generation is not None else None
    ends = set(found) if isinstance(found, list) else {found}
    return {token for token in ends | {tokenizer.eos_token_id} if token is not None}


def _choose(logits: Tensor, temperature: float, top_p: float, draw: torch.Generator) -> int:
    """The next token from logits [V]."""
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities, tokens = (logits / temperature).softmax(-1).cpu().sort(descending=True, stable=True)
    likelier = probabilities.cumsum(0) - probabilities  # of all tokens before this one
    return int(tokens[probabilities.masked_fill(likelier >= top_p, 0.0).multinomial(1, generator=draw)])


def _settled(text: str, stop: str | None) -> int:
    """How much of an unfinished text can be shown: no half characters, nothing that may yet become ``stop``."""
    end = len(text.rstrip(UNFINISHED))
    for length in range(min(len(stop or ""), end), 0, -1):
        if stop is not None and stop.startswith(text[end - length : end]):
            return end - length
    return end


def _check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    if temperature < 0:
        raise ConfigError(f"temperature {temperature}: must be 0 (the likeliest token) or above; try 0.7")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p {top_p}: must be above 0 and at most 1")
