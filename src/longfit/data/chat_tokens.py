"""A rendered text becomes tokens in which control tokens are control only where the template wrote them.

What somebody typed is text, even where it spells ``<|im_end|>``: text between the template's own control tokens is
tokenised with special-token splitting off. Where a tokenizer cannot, the row is refused.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longfit.data.chat_notes import ChatNotes
from longfit.data.template import ChatTemplate
from longfit.data.tokenizing_border import tokenizing
from longfit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_bos(ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> np.ndarray:
    """Begin with BOS exactly once if the tokenizer begins its texts with it.

    Raises: DataError: the template wrote two.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    if len(ids) > 1 and ids[0] == ids[1] == bos:
        raise DataError(
            f"two {tokenizer.bos_token!r} tokens at the start; remove one from the template (data.chat_template)"
        )
    if template.adds_bos and not (len(ids) and ids[0] == bos):
        return np.concatenate([np.asarray([bos], dtype=np.int32), ids])
    return ids


def text_to_tokens(
    text: str,
    said: Sequence[tuple[int, int]],
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    notes: ChatNotes | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a rendering in which control tokens are control only outside of what a row says.

    Args:
        said: spans of the text that come from the row.
    Returns: ids int32 ``[N]``; the character at which each token begins, int64 ``[N]``.
    Raises: DataError: the tokenizer cannot read these control tokens as text.
    """
    matches = list(template.control.finditer(text)) if template.control else []
    typed = [m for m in matches if any(start < m.end() and m.start() < end for start, end in said)]
    if not typed:
        return _tokens(text, tokenizer)
    if notes is not None:
        notes.counts["rows spell out control tokens in what they say; they are tokenised as text"] += 1
    control = [match for match in matches if match not in typed]
    pieces = _by_sections(text, control, tokenizer)
    # Sections are tokenised one by one, which some tokenizers do otherwise than in the whole; words of the same length
    # in the place of the typed control tokens show whether this one does.
    harmless = text
    for match in typed:
        harmless = harmless[: match.start()] + "x" * len(match.group()) + harmless[match.end() :]
    whole, _ = _tokens(harmless, tokenizer)
    if not np.array_equal(_by_sections(harmless, control, tokenizer)[0], whole):
        raise DataError(
            f"it spells out the control token {typed[0].group()!r}, which this tokenizer cannot read as text; "
            "remove it, or skip such rows with data.bad_rows=skip"
        )
    return pieces


def _by_sections(
    text: str, control: Sequence["re.Match[str]"], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise what lies between control tokens as text, whatever it spells."""
    all_ids, all_starts = [], []
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    position = 0
    for match in [*control, None]:
        end = match.start() if match else len(text)
        token = added.get(match.group()) if match else None
        if token is not None and token.lstrip:  # it swallows the space around it
            end = len(text[:end].rstrip())
        if end > position:
            ids, starts = _tokens(text[position:end], tokenizer, as_text=True)
            all_ids.append(ids)
            all_starts.append(starts + position)
        if match:
            all_ids.append(np.asarray([tokenizer.convert_tokens_to_ids(match.group())], dtype=np.int32))
            all_starts.append(np.asarray([match.start()], dtype=np.int64))
            position = match.end()
            if token is not None and token.rstrip:
                position = len(text) - len(text[position:].lstrip())
    return np.concatenate(all_ids), np.concatenate(all_starts)


def _tokens(text: str, tokenizer: "PreTrainedTokenizerBase", *, as_text: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise; ids and the character at which each token begins. `as_text`: control tokens in it are text."""
    options = {"split_special_tokens": True} if as_text else {}
    with tokenizing(tokenizer):
        if tokenizer.is_fast:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
            starts = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
            return np.asarray(encoded["input_ids"], dtype=np.int32), starts
        ids = np.asarray(tokenizer(text, add_special_tokens=False, **options)["input_ids"], dtype=np.int32)
    return ids, _starts_without_offsets(text, ids, tokenizer)


def _starts_without_offsets(text: str, ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """Find where tokens begin, for tokenizers written in Python: decode prefixes and see how long they are.

    Raises: DataError: the decoded prefixes are no prefixes of the text.
    """
    starts = np.zeros(len(ids), dtype=np.int64)
    length = 0
    for index in range(len(ids)):
        starts[index] = length
        head = tokenizer.decode(ids[: index + 1].tolist(), clean_up_tokenization_spaces=False)
        whole = head.rstrip("\N{REPLACEMENT CHARACTER}")
        if not text.startswith(whole):
            raise DataError(
                "this slow tokenizer does not give its text back, so the answer's tokens cannot be told apart; "
                "use a fast tokenizer (tokenizer.json)"
            )
        length = len(whole)
    return starts
