"""Tokens that a tokenizer has and the embedding lacks: caught when a model is loaded, or given rows that train alone.

A tokenizer grows easily (role markers, tags), the matrices beside it do not. Each new row begins as the mean of all
others, in the embedding and in the output matrix: the new token is then as likely as an average one. Only these rows
train, by PEFT's trainable token indices, and they are saved with the adapter, so whoever loads it needs nothing but
rows of any content in their place. ``base_vocab_size`` in ``config.json`` says where they begin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longfit.compat.transformers import tied_weights
from longfit.errors import ModelError

FIRST_NEW_ROW = "base_vocab_size"  # in the configuration: rows that the base itself has


def num_tokens(tokenizer: Any) -> int:
    """Rows that a tokenizer needs: one more than its largest token."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def require_rows(model: Any, tokenizer: Any, name: str, *, needed: int | None = None) -> None:
    """Raise ModelError if a tokenizer makes tokens for which the embedding has no row, before a text runs into one.

    Args:
        needed: tokens of the tokenizer's file, where transformers adds tokens of its own behind them; None: all.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    needed = needed or num_tokens(tokenizer)
    if needed <= rows:
        return
    first = tokenizer.convert_ids_to_tokens([rows])[0]
    raise ModelError(
        f"{name}: the tokenizer has {needed:,} tokens, the embedding {rows:,} rows: {first!r} (token {rows:,}) is the"
        " first without one. longfit train MODEL DATA adapter.train_new_tokens=true gives them rows (in Python:"
        " load(..., resize_embeddings=True), then add_adapters(..., train_new_tokens=True))"
    )


@torch.no_grad()
def add_rows(model: Any, tokenizer: Any, name: str) -> None:
    """Give every token of the tokenizer a row in the embedding and in the output matrix, in place.

    Raises: ModelError: the family has tables beside these two that a token needs a row in, or a head that cannot grow.
    """
    rows, needed = int(model.get_input_embeddings().weight.shape[0]), num_tokens(tokenizer)
    if needed <= rows:
        return
    _require_plain_tables(model, name, rows)
    means = {table: model.get_parameter(f"{table}.weight").float().mean(0) for table in tables(model)}
    model.resize_token_embeddings(needed, mean_resizing=False)
    for table, mean in means.items():
        weight = model.get_parameter(f"{table}.weight")
        weight[rows:] = mean.to(weight.dtype)
        weight.requires_grad_(False)
    setattr(model.config, FIRST_NEW_ROW, rows)


def added_rows(config: Any) -> range:
    """The rows that a model has and its base has not, told from its configuration."""
    first = getattr(config, FIRST_NEW_ROW, None)
    return range(0) if first is None else range(int(first), int(config.get_text_config().vocab_size))


def tables(model: Any) -> list[str]:
    """Full names of the modules with a row a token: the embedding, and the output matrix where it is another one."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embeddings] if tied_weights(model) else [embeddings, head]
    return [name for name, module in model.named_modules() if any(module is one for one in wanted)]


def _require_plain_tables(model: Any, name: str, rows: int) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    own = {id(p) for module in (embeddings, head) for p in module.parameters()}
    others = [key for key, p in model.named_parameters() if id(p) not in own and p.dim() and p.shape[0] == rows]
    problem = f"{others[0]} has a row a token, too" if others else None
    if type(head) is not nn.Linear or head.bias is not None:
        problem = f"its output matrix is a {type(head).__name__}{' with a bias' if type(head) is nn.Linear else ''}"
    if not isinstance(embeddings, nn.Embedding):
        problem = f"its embedding is a {type(embeddings).__name__}"
    if problem is not None:
        raise ModelError(
            f"{name}: new tokens cannot be given rows here: {problem}; resize the model with its own tools, save it,"
            " and train that"
        )


def grown(weight: Tensor, rows: int) -> Tensor:
    """A base's table ``[V, D]`` with as many rows as asked for; the new ones hold the mean of the others."""
    if len(weight) >= rows:
        return weight
    mean = weight.float().mean(0).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])
