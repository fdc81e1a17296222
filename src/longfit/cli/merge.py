"""``longfit merge RUN --out DIR``: adapter and base become one model, its drift measured."""

from __future__ import annotations

from typing import Annotated

import typer

from longfit.cli import merge_and_export as shared
from longfit.cli.output import print_json, print_lines, show_progress
from longfit.cli.values import read_tokens
from longfit.words import format_bytes


def merge(
    run: shared.Run,
    words: shared.Words = None,
    *,
    out: shared.Out,
    onto: Annotated[str, typer.Option(help="16bit, 4bit, or auto: the one that drifts less.")] = "auto",
    checkpoint: shared.Checkpoint = None,
    base: shared.Base = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: as trained.")] = None,
    text: shared.Text = None,
    tokens: shared.Tokens = "2048",
    measure: shared.Measure = True,
    as_json: shared.AsJson = False,
) -> None:
    """Merge a run's adapter into its base: plain safetensors for transformers, vLLM and the like."""
    count = read_tokens("--tokens", tokens)
    decided = shared.read_words(run, words)

    from longfit.exporting.merge import merge as merge_run

    with show_progress(quiet=as_json) as on_event:
        result = merge_run(
            run,
            out,
            onto=onto,
            checkpoint=checkpoint,
            base=base,
            dtype=dtype,
            text=text,
            tokens=count,
            measure=measure,
            on_event=on_event,
            **decided,
        )
    if as_json:
        print_json(result)
        return
    shared.print_drift(result)
    print_lines(
        f"{result.out}: merged onto the {result.onto} base ({result.reason}); {result.changed} of {result.num_tensors} "
        f"tensors changed, {format_bytes(result.num_bytes)} in {result.dtype}; {result.tied}"
    )
    shared.print_warnings(result)
