"""``longfit eval RUN|MODEL ppl --data PATH``: measure a run or a base model on held-out text."""

from dataclasses import asdict
from typing import Annotated

import typer

from longfit.cli.output import print_json, print_lines, print_note, print_table, show_count
from longfit.cli.values import read_tokens
from longfit.errors import ConfigError

MEASURES = ("ppl",)


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a base model.")],
    measure: Annotated[str, typer.Argument(metavar="[ppl]", help="What to measure: ppl, perplexity.")] = "ppl",
    data: Annotated[str | None, typer.Option(help="Held-out text: a file or folder.")] = None,
    window: Annotated[str | None, typer.Option(help="Tokens read at once; default: what the model takes.")] = None,
    stride: Annotated[str | None, typer.Option(help="Tokens between windows; default: the window.")] = None,
    convention: Annotated[str, typer.Option(help="document or longlora: which tokens are scored.")] = "document",
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
    from longfit.training.prepare import native_context, open_target, read_token_ids

    print_note(f"loading {target}")
    model, tokenizer = open_target(target, quant=quant)
    token_ids = read_token_ids(data, tokenizer, max_tokens=tokens.get("--max-tokens"))
    width = tokens.get("--window", native_context(model.config))
    num_tokens = sum(len(row) for row in token_ids)
    print_note(f"measuring {num_tokens:,} tokens of {len(token_ids):,} documents in windows of {width:,}")
    with show_count("windows") as on_progress:
        result = perplexity(
            model,
            token_ids,
            window=width,
            stride=tokens.get("--stride", width),
            convention=convention,
            on_progress=on_progress,
        )
    if as_json:
        print_json(asdict(result))
        return
    print_lines(
        f"perplexity {result.perplexity:.4f} over {result.num_tokens:,} tokens "
        f"(convention {result.convention}, window {result.window:,}, stride {result.stride:,})"
    )
    rows = [
        (f"{bucket.start:,} to {bucket.stop:,}", f"{bucket.num_tokens:,}", f"{bucket.perplexity:.4f}")
        for bucket in result.by_position
    ]
    print_table(("position in the window", "tokens", "perplexity"), rows)
