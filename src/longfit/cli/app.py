"""The command ``longfit``: its verbs, and how every one of them ends.

A verb parses, calls one library function and prints. Nothing heavy is imported before a verb runs: help is instant.
Exit codes: 0 done, 1 our fault, 2 the user can fix it, 130 stopped by Ctrl-C. Tracebacks only with ``--debug``.
"""

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from longfit.cli import chat, data, demo, doctor, evaluate, explain, export, merge, plan, runs, train
from longfit.cli.output import print_error, print_json_error, print_note
from longfit.errors import BackendError, ConfigError, LongfitError
from longfit.files.writing import FULL, READ_ONLY, why
from longfit.kernels.cpu.threads import limit_threads
from longfit.parallel.launch import Place, leave_reason

EXIT_OURS, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130
OF_THE_MACHINE = frozenset({*FULL, *READ_ONLY, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG})
"""What a file system says of itself, wherever it says so: no code of ours is at fault."""

app = typer.Typer(
    name="longfit",
    help="Fine-tune large language models lighter (QLoRA) and longer (LongLoRA). Start with: longfit demo",
    no_args_is_help=True,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("data")(data.data)
app.command("runs")(runs.runs)
app.command("doctor")(doctor.doctor)
app.command("explain")(explain.explain)


def _version(asked: bool) -> None:
    if asked:
        from longfit.cli.doctor import package_version

        typer.echo(f"longfit {package_version('longfit') or '(not installed, run from its sources)'}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Options of every verb; ``main`` has taken ``--debug`` out already, wherever it stood."""


def _show_warning(message: Warning | str, *place: object, **more: object) -> None:
    """Print a warning as one line, without the place in the code that Python adds; one process speaks for all."""
    if not Place.of(os.environ).rank:
        print_note(f"warning: {message}")


RENAMED_FLAGS = {"--arena": "--offload"}
"""Options that have another name now."""


def _refuse_renamed(words: Sequence[str]) -> None:
    for flag in (word.partition("=")[0] for word in words):
        if flag in RENAMED_FLAGS:
            raise ConfigError(f"{flag} is called {RENAMED_FLAGS[flag]} now; write that")


def _refuse_undecodable(words: Sequence[str]) -> None:
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):  # how Python shows bytes that are no UTF-8
            shown = word.encode("ascii", "backslashreplace").decode()
            raise ConfigError(f"{shown}: not UTF-8, and a run writes its names down as that; rename the file or folder")


def _open_closed_streams() -> None:
    """Let what is written to a stream that the shell has closed (``>&-``) go nowhere."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: those of the process.
    Returns: the exit code.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows an escape for what it cannot
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.stderr.isatty():  # other libraries' bars are noise in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    limit_threads()
    # PEFT imports bitsandbytes wherever it is installed; its advice about its own kernels concerns nobody here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        _refuse_renamed(words)
        _refuse_undecodable(words)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if not debug:  # what other libraries will change is for developers
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
            try:
                app(args=words, prog_name="longfit")
            finally:
                sys.stdout.flush()  # here its failure can still be told
    except SystemExit as exit_:  # how typer ends, after help, usage errors and verbs alike
        code = exit_.code if isinstance(exit_.code, int) else EXIT_OURS
        if code == EXIT_USER and "--json" in words:
            print_json_error("UsageError", "the command line is wrong; stderr says how", code=code)
        return code
    except KeyboardInterrupt:
        print_error("stopped; nothing was left half-written")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        return 0
    except BaseException as error:  # the outermost frame
        if debug or isinstance(error, GeneratorExit):
            raise
        return _tell(error, as_json="--json" in words)
    return 0


def _tell(error: BaseException, *, as_json: bool) -> int:
    """Say why a command failed, once among the processes of a run; return the exit code."""
    text, code = str(error), EXIT_OURS
    if isinstance(error, LongfitError):
        code = EXIT_OURS if isinstance(error, BackendError) else EXIT_USER
    elif isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        text, code = f"{error.filename or 'output'}: {why(error)}", EXIT_USER
    elif isinstance(error, MemoryError):
        text, code = "there is not enough memory for this; longfit plan says what a run takes, and how to take less", 2
    else:
        text = f"{type(error).__name__}: {error}"
    if leave_reason(error):
        return code
    print_error(text)
    if code == EXIT_OURS and not isinstance(error, LongfitError):
        print_error("this is a bug in longfit, not in what you did: repeat with --debug and report the traceback")
    try:
        if as_json:
            print_json_error(type(error).__name__, text, code=code)
        sys.stdout.flush()
    except OSError:  # it was the output that failed: Python must not try once more
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    return code
