"""What verbs print: errors to stderr, results to stdout, progress as a bar on a terminal and plain lines elsewhere.

Everything that reaches a terminal passes here, and through `visible`: the names of files, what is in them, and what a
model says are written by others.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from longfit.words import format_bytes, sparkline, visible

if TYPE_CHECKING:
    from longfit.training.metrics import Event, OnEvent

COUNT_SECONDS = 5.0  # between lines that say how many documents are done
LINE_SECONDS = 2.0  # between plain step lines, so that a log of a fast run stays readable
PACE_SECONDS = (
    7 * 86_400.0
)  # how far back the pace reaches that time left is told by: a step of a long context takes minutes


def _console(*, stderr: bool) -> Console:
    """A console that shows texts as they are: no markup, no emoji, nothing cut."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


def print_error(text: str) -> None:
    """Print an error to stderr."""
    console = _console(stderr=True)
    console.print("error:", style="bold red", end=" ")
    console.print(visible(text))


def print_note(text: str) -> None:
    """Print a line to stderr that is not an error, and not the result either."""
    _console(stderr=True).print(visible(text))


def print_json(value: object) -> None:
    """Print one JSON document to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=_plain, allow_nan=True) + "\n")


def print_json_error(kind: str, text: str, *, code: int) -> None:
    """Print to stdout, for who reads results by machine, why there is none."""
    print_json({"error": {"kind": kind, "message": text, "exit_code": code}})


def print_lines(*lines: str) -> None:
    """Print plain lines to stdout."""
    sys.stdout.write("".join(f"{visible(line)}\n" for line in lines))


def print_piece(text: str) -> None:
    """Print a piece of a line to stdout at once."""
    sys.stdout.write(visible(text))
    sys.stdout.flush()


def print_spans(spans: Sequence[tuple[str, bool]]) -> None:
    """Print a text of which some is trained: in colour on a terminal, in double brackets elsewhere."""
    console = _console(stderr=False)
    if not console.is_terminal:
        print_lines("", "sample ([[...]] is trained):")
        print_lines("".join(f"[[{text}]]" if trained else text for text, trained in spans))
        return
    console.print("\nsample:", "[bold green]trained[/]", "[dim]masked[/]", markup=True)
    for text, trained in spans:
        console.print(visible(text), style="bold green" if trained else "dim", end="")
    console.print()


PART_MARKS = {"trained": ("[[", "]]"), "masked": ("", ""), "added": ("<<", ">>"), "dropped": ("\n(dropped: ", ")")}
PART_STYLES = {"trained": "bold green", "masked": "dim", "added": "cyan", "dropped": "bold red"}


def print_parts(views: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Print texts in parts ``(text, kind)``, each kind in its colour on a terminal and between its marks elsewhere."""
    console = _console(stderr=False)
    if console.is_terminal:
        console.print("chats:", *(f"[{style}]{kind}[/]" for kind, style in PART_STYLES.items()), markup=True)
    else:
        print_lines("chats ([[...]] is trained, <<...>> is added by the template, the rest is masked):")
    for view in views:
        for text, kind in view:
            if console.is_terminal:
                shown = f"\ndropped: {text}" if kind == "dropped" else text
                console.print(visible(shown), style=PART_STYLES[kind], end="")
            else:
                before, after = PART_MARKS[kind]
                print_piece(f"{before}{text}{after}")
        print_lines("", "")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns; nothing is cut, so that what is shown can be pasted."""
    lines = [[visible(cell) for cell in line] for line in (columns, *rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print_lines("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _plain(value: Any) -> object:
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} in JSON output")


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator["OnEvent"]:
    """Show the events of a run: a bar on a terminal, lines elsewhere; to stderr, so that stdout holds results only.

    Args:
        quiet: show warnings only.
    """
    console = _console(stderr=True)
    if quiet or not console.is_terminal:
        yield _Lines(console, quiet=quiet)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, transient=True, speed_estimate_period=PACE_SECONDS) as progress:
        task = progress.add_task("preparing", total=None)
        losses: list[float] = []

        def show(event: "Event") -> None:
            values = event.values
            if event.kind == "step":
                losses.append(float(str(values["loss"])))
                text = f"{sparkline(losses)} loss {values['loss']:.4f}  {values['tokens_per_s']:,.0f} tokens/s"
                text += _memory(values)
                progress.update(task, description=text, completed=int(str(values["step"])))
                return
            if event.kind == "count":
                total = values["of"]
                progress.update(
                    task,
                    description=event.text,
                    completed=int(str(values["done"])),
                    total=None if total is None else int(str(total)),
                )
                return
            if "total_steps" in values:
                total, done = (int(str(values[name])) for name in ("total_steps", "step"))
                progress.reset(task, total=total, completed=done, start=True)  # the documents before had another pace
            progress.console.print(visible(f"warning: {event.text}" if event.kind == "warning" else event.text))

        yield show


@contextmanager
def show_count(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show how many of something are done: a bar on a terminal, a line every few seconds elsewhere; to stderr."""
    console = _console(stderr=True)
    if not console.is_terminal:
        began = next_line_at = time.monotonic()

        def count(done: int, total: int) -> None:
            nonlocal next_line_at
            now = time.monotonic()
            if now >= next_line_at + LINE_SECONDS:
                next_line_at = now
                console.print(f"{done}/{total} {unit}, {now - began:.0f} s")

        yield count
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(unit, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _memory(values: Mapping[str, object]) -> str:
    """The measured peak against the planned one, where a step tells both."""
    peak, planned = values.get("peak_memory_bytes"), values.get("planned_peak_bytes")
    if peak is None:
        return ""
    against = "" if planned is None else f" of {format_bytes(float(str(planned)))} planned"
    return f"  {format_bytes(float(str(peak)))}{against}"


class _Lines:
    """Events as plain lines; steps not more often than every two seconds, the first and the last always."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.next_line_at = 0.0
        self.next_count_at = time.monotonic() + COUNT_SECONDS
        self.total_steps: object = None

    def __call__(self, event: "Event") -> None:
        self.total_steps = event.values.get("total_steps", self.total_steps)
        if event.kind == "warning":
            self.console.print(visible(f"warning: {event.text}"))
            return
        now = time.monotonic()
        if self.quiet:
            return
        if event.kind == "count":
            if now >= self.next_count_at:
                self.next_count_at = now + COUNT_SECONDS
                self.console.print(event.text)
            return
        if event.kind == "step" and now < self.next_line_at and event.values["step"] != self.total_steps:
            return
        self.next_line_at = now + LINE_SECONDS if event.kind == "step" else self.next_line_at
        self.console.print(visible(event.text))
