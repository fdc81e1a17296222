"""``longfit export RUN --format gguf --out DIR``: a run for llama.cpp, Ollama, bitsandbytes, its drift measured."""

from __future__ import annotations

from typing import Annotated

import typer

from longfit.cli import merge_and_export as shared
from longfit.cli.output import print_json, print_lines, show_progress
from longfit.cli.values import read_tokens


def export(
    run: shared.Run,
    words: shared.Words = None,
    *,
    out: shared.Out,
    format: Annotated[str, typer.Option(help="gguf, gguf-lora, safetensors or bnb-4bit.")] = "gguf",
    type: Annotated[str, typer.Option(help="Of a GGUF file: F16, BF16, Q8_0 or Q4_0.")] = "Q8_0",
    onto: Annotated[
        str, typer.Option(help="16bit, 4bit, or auto: the one that the adapter was trained beside.")
    ] = "auto",
    ollama: Annotated[bool, typer.Option("--ollama", help="Write a Modelfile too.")] = False,
    checkpoint: shared.Checkpoint = None,
    base: shared.Base = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of safetensors and bnb-4bit: bfloat16, float16 or float32. Default: as trained.")
    ] = None,
    text: shared.Text = None,
    tokens: shared.Tokens = "2048",
    measure: shared.Measure = True,
    as_json: shared.AsJson = False,
) -> None:
    """Write a run for another program; what it holds is checked tensor by tensor before it appears."""
    count = read_tokens("--tokens", tokens)
    decided = shared.read_words(run, words)

    from longfit.exporting.export import export as export_run

    with show_progress(quiet=as_json) as on_event:
        result = export_run(
            run,
            out,
            format=format,
            type=type,
            onto=onto,
            checkpoint=checkpoint,
            base=base,
            dtype=dtype,
            ollama=ollama,
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
    onto_base = f", merged onto the {result.onto} base" if result.onto else ""
    print_lines(f"{', '.join(str(result.out / name) for name in result.files)}{onto_base}")
    shared.print_warnings(result)
    if result.commands:
        print_lines("use it:", *(f"  {command}" for command in result.commands))
