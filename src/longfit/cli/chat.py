"""``longfit chat RUN|MODEL --document book.txt``: ask about a long document, or just talk."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from longfit.cli.output import print_json, print_lines, print_note, print_piece, show_count
from longfit.cli.values import read_tokens
from longfit.errors import DataError

if TYPE_CHECKING:
    from longfit.config.sections import DataSection


def chat(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a base model.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Of model and data.", show_default=False),
    ] = None,
    *,
    document: Annotated[str | None, typer.Option(help="What to talk about: one text file; read whole.")] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Ask this and end; may be given several times. Default: ask you.")
    ] = None,
    max_new_tokens: Annotated[str, typer.Option(help="Longest answer.")] = "512",
    temperature: Annotated[float, typer.Option(help="0: the likeliest words; 0.7: livelier.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the words with this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    quant: Annotated[str | None, typer.Option(help="nf4, fp4, int4, int8 or none; default: nf4, or the run's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: what is fast here.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Of a run: best, last or a name. Default: the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print questions and answers as JSON.")] = False,
) -> None:
    """Talk with a run's model or a base model, with exact attention.

    A document that does not fit the context is refused, never cut. It is read once; further questions are quick.
    """
    longest = read_tokens("--max-new-tokens", max_new_tokens)
    interactive = not question and sys.stdin.isatty()

    from longfit.evaluation.generate import Conversation, require_space
    from longfit.training.prepare import open_target, target_config

    flags = {"--quant": ("model.quant", quant), "--dtype": ("model.dtype", dtype)}
    given = {flag: (key, value) for flag, (key, value) in flags.items() if value is not None}
    config = target_config(target, data=document, overrides=settings or [], flags=given)
    text = None if document is None else read_document(document, config.data)
    print_note(f"loading {target}")
    model, tokenizer = open_target(target, config=config, checkpoint=checkpoint)
    talk = Conversation(model, tokenizer, document=text)
    require_space(len(talk.prompt("")), longest, talk.context)
    if document is not None:
        print_note(f"{document}: {len(talk.prompt('')):,} of {talk.context:,} tokens")
    for number, asked in enumerate(question or _questions(interactive)):
        with show_count("tokens read") as on_progress:
            answer = talk.ask(
                asked,
                max_new_tokens=longest,
                temperature=temperature,
                top_p=top_p,
                seed=seed + number,
                on_progress=on_progress,
            )
            first = next(answer, "")
        if as_json:
            list(answer)
            continue
        print_piece(first)
        for piece in answer:
            print_piece(piece)
        print_lines("")
    if as_json:
        print_json([{"question": asked, "answer": answer} for asked, answer in talk.turns])


def read_document(path: str, data: "DataSection") -> str:
    """Read one text, as the settings of the data say.

    Raises: DataError: none, or several.
    """
    from longfit.training.prepare_data import read_path

    documents = list(read_path(path, data))
    if len(documents) != 1:
        raise DataError(f"{path}: holds {len(documents):,} documents; --document takes one text file")
    if documents[0].text is None:
        raise DataError(f"{path}: holds a chat; --document takes a text")
    return documents[0].text


def _questions(interactive: bool) -> Iterator[str]:
    """What the user types, until the end of input."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    print_note("ask; Ctrl-D ends")
    while True:
        try:
            asked = input("> ").strip()
        except EOFError:
            return
        if asked:
            yield asked
