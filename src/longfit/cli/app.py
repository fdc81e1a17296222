"""The command ``longfit``: its verbs, and how every one of them ends.

A verb parses, calls one library function and prints. Nothing heavy is imported before a verb runs: help is instant.
Exit codes: 0 done, 1 our fault, 2 the user can fix it, 130 stopped by Ctrl-C. Tracebacks only with ``--debug``.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from longfit.cli import chat, data, demo, doctor, evaluate, explain, export, merge, plan, runs, train
from longfit.cli.output import print_error, print_note
from longfit.errors import BackendError, ConfigError, LongfitError
from longfit.kernels.cpu.threads import limit_threads
from longfit.parallel.launch import leave_reason

EXIT_OURS, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130

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
    """Print a warning as one line, without the place in the code that Python adds."""
    print_note(f"warning: {message}")


RENAMED_FLAGS = {"--arena": "--offload"}
"""Options that have another name now."""


def _refuse_renamed(words: Sequence[str]) -> None:
    for flag in (word.partition("=")[0] for word in words):
        if flag in RENAMED_FLAGS:
            raise ConfigError(f"{flag} is called {RENAMED_FLAGS[flag]} now; write that")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: those of the process.
    Returns: the exit code.
    """
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
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if not debug:  # what other libraries will change is for developers
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
            app(args=words, prog_name="longfit")
    except SystemExit as exit_:  # how typer ends, after help, usage errors and verbs alike
        return exit_.code if isinstance(exit_.code, int) else EXIT_OURS
    except KeyboardInterrupt:
        print_error("stopped; nothing was left half-written")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        return 0
    except LongfitError as error:
        if debug:
            raise
        if not leave_reason(error):
            print_error(str(error))
        return EXIT_OURS if isinstance(error, BackendError) else EXIT_USER
    except Exception as error:  # the outermost frame: everything else is a bug, told without a traceback unless asked
        if debug:
            raise
        if leave_reason(error):
            return EXIT_OURS
        print_error(f"{type(error).__name__}: {error}")
        print_error("this is a bug in longfit, not in what you did: repeat with --debug and report the traceback")
        return EXIT_OURS
    return 0
