"""``longfit eval RUN|MODEL ppl --data PATH``: measure a run or a base model on held-out text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from longfit.cli.output import print_json, print_lines, print_note, print_table
from longfit.cli.values import read_tokens
from longfit.errors import ConfigError

MEASURES = ("ppl",)


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a base model.")],
    measure: Annotated[str, typer.Argument(metavar="[ppl]", help="What to measure: ppl, perplexity.")] = "ppl",
    data: Annotated[str | None, typer.Option(help="Held-out text: a file or folder.")] = None,
    window: Annotated[str, typer.Option(help="Tokens read at once.")] = "8k",
    stride: Annotated[str | None, typer.Option(help="Tokens between windows; default: the window.")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Use only the first tokens of the text.")] = None,
    quant: Annotated[str, typer.Option(help="For a base model: nf4, fp4, int4 or none.")] = "nf4",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure perplexity, over all and by position in the window.

    A run directory is enough: base model, context and adapter are read from it.
    """
    if measure not in MEASURES:
        raise ConfigError(f"{measure!r}: cannot be measured; one of {', '.join(MEASURES)}")
    if data is None:
        raise ConfigError("no text given: longfit eval RUN|MODEL ppl --data PATH")
    sizes = {"--window": window, "--stride": stride, "--max-tokens": max_tokens}
    tokens = {flag: read_tokens(flag, value) for flag, value in sizes.items() if value is not None}

    from longfit.evaluation.perplexity import perplexity
    from longfit.training.prepare import join_tokens, open_target

    print_note(f"loading {target}")
    model, tokenizer = open_target(target, quant=quant)
    token_ids = join_tokens(data, tokenizer, max_tokens=tokens.get("--max-tokens"))
    print_note(f"measuring {len(token_ids):,} tokens of {Path(data).name}")
    width = tokens["--window"]
    result = perplexity(model, token_ids, window=width, stride=tokens.get("--stride", width))
    if as_json:
        print_json(asdict(result))
        return
    print_lines(f"perplexity {result.perplexity:.4f}  ({result.convention})")
    rows = [(f"{bucket.start:,} to {bucket.stop:,}", f"{bucket.perplexity:.4f}") for bucket in result.by_position]
    print_table(("position", "perplexity"), rows)
