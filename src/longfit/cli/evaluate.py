"""``longfit eval RUN|MODEL ppl --data PATH``: measure a run or a base model on held-out text."""

from pathlib import Path
from typing import Annotated

import typer

from longfit.cli.output import print_json, show_progress
from longfit.errors import ConfigError

MEASURES = ("ppl",)


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a base model.")],
    measure: Annotated[str, typer.Argument(metavar="[ppl]", help="What to measure: ppl, perplexity.")] = "ppl",
    data: Annotated[str | None, typer.Option(help="Held-out text: a file or folder.")] = None,
    window: Annotated[str | None, typer.Option(help="Tokens read at once; default: the run's context.")] = None,
    stride: Annotated[str | None, typer.Option(help="Tokens between windows; default: the window.")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Use only so many tokens of the text.")] = None,
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
    from longfit.evaluation.open_run import evaluate_perplexity

    with show_progress(quiet=as_json) as on_event:
        result = evaluate_perplexity(
            Path(target) if Path(target).exists() else target,
            data,
            window=window,
            stride=stride,
            max_tokens=max_tokens,
            quant=quant,
            on_event=on_event,
        )
    if as_json:
        print_json(result)
        return
