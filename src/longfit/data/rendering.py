"""Where chat templates run: a process of their own, with limits on its time, its memory and what it may answer.

A template is a program that comes with a model somebody published. Jinja's sandbox keeps it from the machine, but lets
it loop for ever, or multiply a text until memory is gone, already while it is compiled. Here it can do so to nobody
else: this file is run as ``python -m longfit.data.rendering`` by `template_process.py`, answers requests until its
input ends, and may be killed at any moment. It imports nothing but Jinja, so it starts in a fifth of a second on any
system.

The environment is the one that transformers renders with (sandboxed, blocks trimmed, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, the `{% generation %}` tag), so the same template gives the same text; a test
compares them.
"""

import json
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import TemplateError, nodes

FRAME = struct.Struct("<Q")
MEMORY_BYTES = 1 << 30
"""Address space above what the process begins with; a chat of a million tokens takes a twentieth of it."""
FREE_CHARS, CHARS_PER_BYTE = 1 << 20, 16
"""A rendering may have this many characters, and so many more for each byte of its messages."""


class Marks:
    """Where the `{% generation %}` blocks of one rendering lie. Jinja yields a block's text as a piece of its own."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.length = 0
        self._open: list[str] = []

    def add(self, text: str) -> None:
        self._open.append(text)

    def place(self, piece: str) -> None:
        for text in self._open:
            if piece == text:
                self.spans.append((self.length, self.length + len(piece)))
        self._open.clear()
        self.length += len(piece)


def environment(now: Callable[[], datetime], marks: Marks) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Make the environment in which templates are parsed and rendered."""

    class Generation(jinja2.ext.Extension):
        """The tag around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(line)

        def enclose(self, caller: Callable[[], str]) -> str:
            text = caller()
            marks.add(text)
            return text

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: now().strftime(form)
    return made


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


class _Compiled:
    """A template, ready to render; ``date`` is what `strftime_now` formats."""

    def __init__(self, source: str) -> None:
        self.date: datetime | None = None
        self.marks = Marks()
        self._template = environment(lambda: self.date or datetime.now(), self.marks).from_string(source)

    def render(self, variables: dict[str, Any], most_chars: int) -> dict[str, Any]:
        """Render; a text that grows beyond its limit is broken off."""
        self.marks.begin()
        pieces: list[str] = []
        for piece in self._template.generate(**variables):
            self.marks.place(piece)
            pieces.append(piece)
            if self.marks.length > most_chars:
                return {"grows": most_chars}
        return {"text": "".join(pieces), "spans": self.marks.spans}


def answer(known: dict[str, _Compiled], request: dict[str, Any], num_bytes: int) -> dict[str, Any]:
    """Answer one request.

    Args:
        known: templates compiled before, by their text; one is added.
        request: source, date, variables.
        num_bytes: of the request.
    Returns: text and spans; or why not: refused or syntax with a line, grows, memory.
    """
    try:
        if request["source"] not in known:
            known[request["source"]] = _Compiled(request["source"])
        template = known[request["source"]]
        template.date = request["date"]
        return template.render(request["variables"], FREE_CHARS + CHARS_PER_BYTE * num_bytes)
    except MemoryError:
        return {"memory": True}
    except jinja2.TemplateSyntaxError as error:
        return {"syntax": error.message, "line": error.lineno}
    except RecursionError:
        return {"refused": "it is nested too deeply, or calls itself for ever", "line": "unknown"}
    except Exception as error:  # a template can raise whatever Python can
        return {"refused": str(error) or type(error).__name__, "line": _template_line(error)}


def _template_line(error: Exception) -> int | str:
    """Find the template's line: Jinja rewrites its frames so that they carry it."""
    line: int | str = "unknown"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _limit_memory() -> None:
    """Limit the address space, where the system has such limits; elsewhere the parent looks at what is resident."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        with open("/proc/self/statm") as file:
            begun = int(file.read().split()[0]) * resource.getpagesize()
        most = begun + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _requests(stream: BinaryIO) -> Iterator[bytes]:
    while len(head := stream.read(FRAME.size)) == FRAME.size:
        yield stream.read(FRAME.unpack(head)[0])


def main() -> None:
    """Answer requests from stdin on stdout until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which ends this process
    _limit_memory()
    answers = os.fdopen(os.dup(1), "wb")
    known: dict[str, _Compiled] = {}
    for data in _requests(sys.stdin.buffer):
        made = answer(known, pickle.loads(data), len(data))
        try:
            reply = json.dumps(made).encode()
        except MemoryError:
            reply = b'{"memory": true}'
        answers.write(FRAME.pack(len(reply)) + reply)
        answers.flush()


if __name__ == "__main__":
    main()
