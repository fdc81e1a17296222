"""``longfit data DATA --model MODEL --context 32k [section.key=value]``: what would be trained on, token by token."""

import shlex
from dataclasses import asdict
from typing import Annotated

import typer

from longfit.cli.output import print_json, print_lines, print_parts, print_spans, show_progress

CHATS_SHOWN = 3


def data(
    path: Annotated[str, typer.Argument(metavar="DATA", help="A file, a table, an archive, or a folder of them.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="As in train.", show_default=False)
    ] = None,
    *,
    model: Annotated[str, typer.Option(help="Whose tokenizer counts: a folder, hub id or .gguf.")],
    context: Annotated[str | None, typer.Option(help="Tokens in a window; default: the model's own.")] = None,
    long_chat: Annotated[str | None, typer.Option(help="error, split, truncate_left, truncate_right, drop.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="chatml, a file, or Jinja text.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As in train; changes no token.")] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Show the first chats: trained, masked, added, dropped; or a text's begin.")
    ] = False,
    lengths: Annotated[bool, typer.Option("--lengths", help="Show how long documents are, and the longest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ledger as JSON.")] = False,
) -> None:
    """Read, tokenise and pack DATA as a training run would, and account for every token."""
    from longfit.config import load_config

    options = {
        "MODEL": ("model.name", model),
        "DATA": ("data.path", path),
        "--context": ("context.context", context),
        "--long-chat": ("data.long_chat", long_chat),
        "--chat-template": ("data.chat_template", chat_template),
        "--dtype": ("model.dtype", dtype),
    }
    flags = {flag: (key, value) for flag, (key, value) in options.items() if value is not None}
    config = load_config(overrides=settings or [], flags=flags)

    from longfit.training.prepare_data import count_tokens, view_chats

    views = view_chats(config, count=CHATS_SHOWN) if sample and not as_json else []
    if views:  # first, because a chat of which something is dropped is an error below
        print_parts([[(part.text, part.kind) for part in view] for view in views])
    with show_progress(quiet=as_json) as on_event:
        ledger = count_tokens(config, on_event=on_event)
    if as_json:
        print_json(asdict(ledger))
        return
    print_lines(*ledger.summary())
    if sample and not views:
        print_spans([(span.text, span.trained) for span in ledger.sample])
    if lengths:
        print_lines("", *ledger.lengths_view())
    told = [("context.context", context), ("data.long_chat", long_chat), ("data.chat_template", chat_template)]
    given = [f"{key}={value}" for key, value in [*told, ("model.dtype", dtype)] if value is not None]
    print_lines("next:", f"  {shlex.join(['longfit', 'train', model, path, *(settings or []), *given])}")
