"""The command line. Every user error is one line on stderr and a non-zero exit code; `--debug` shows the traceback.

torch and transformers are imported only when a command needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from kvgraph import __version__, garbage
from kvgraph.cli import ask, bench, chat, check, data, demo, encode, explain, index, report, serve, store, train, tune
from kvgraph.cli import eval as evaluation
from kvgraph.errors import KVGraphError

USAGE, OTHER = 2, 1  # exit codes
UsageError: Any = typer.BadParameter.__base__  # click's, or the copy of it that newer typers bring along

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(encode.encode)
app.command()(ask.ask)
app.command()(chat.chat)
app.command()(explain.explain)
app.command()(check.check)
app.command()(bench.bench)
app.command("eval")(evaluation.evaluate)
app.command()(report.report)
app.command()(serve.serve)
app.command()(demo.demo)
app.command()(tune.tune)
app.add_typer(index.app, name="index")
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.add_typer(store.app, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvgraph {__version__}")
        raise typer.Exit


@app.callback()
def kvgraph(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compute the KV cache of every document once, and answer questions from the stored caches.

    Encode a corpus, then ask about some of its documents. They are read from the store instead of being prefilled.

    \b
      kvgraph encode MODEL corpus.jsonl --method block --store kv
      kvgraph ask MODEL "Who dug the harbour?" --documents corpus.jsonl --pick 0,3 --method block --store kv

    Start with `kvgraph demo`. A method other than `full` costs quality on a model that isn't tuned for it.
    `kvgraph check MODEL --method block --data questions.jsonl` measures how much.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The `kvgraph` command: run it and exit. 0: success; 1: an error or failed check; 2: wrong usage; 130: Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    garbage.starting()
    _open_streams()
    _keep_libraries_quiet()
    _warn_in_one_line()
    try:
        status = app(words, prog_name="kvgraph", standalone_mode=False)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if _debugging(words):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # not an error: the help was asked for
            print(error, file=sys.stderr)
            sys.exit(USAGE)
        status, message = _explained(error)
        _say(message)
    finally:
        garbage.started()  # if no model was loaded
    if status == 130:
        _say("interrupted")
    sys.exit(status or 0)


def _explained(error: Exception) -> tuple[int, str]:
    """(exit code, one line) for an error."""
    if isinstance(error, KVGraphError):
        return OTHER, str(error)
    if isinstance(error, typer.Abort):
        return OTHER, "stopped; nothing was done"
    if isinstance(error, UsageError):
        context: Any = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "kvgraph"
        return USAGE, f"{error.format_message().rstrip('.')}; see `{command} --help`"  # type: ignore[attr-defined]  # every error of click has it
    if isinstance(error, OSError) and error.strerror:
        return OTHER, f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError):  # the serve command handles the server's own
        extra = "train" if error.name in ("accelerate", "peft", "tensorboard") else "eval"
        return OTHER, f"this needs {error.name}; install it with: pip install 'kvgraph[{extra}]'"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OTHER, "out of memory; try a smaller --kv-budget, fewer documents, or a smaller --dtype"
    return OTHER, f"unexpected {type(error).__name__}: {error}; `kvgraph --debug ...` shows where"


def _debugging(words: list[str]) -> bool:
    """Whether --debug is given, before the command."""
    return "--debug" in itertools.takewhile(lambda word: word.startswith("-"), words)


def _say(message: str) -> None:
    print(f"kvgraph: {' '.join(message.split())}", file=sys.stderr)


def _open_streams() -> None:
    """Streams that were closed lead nowhere, and characters that the output's encoding lacks are replaced.

    No file may get the descriptor of a closed stream: what a library prints would be written into it.
    """
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _keep_libraries_quiet() -> None:
    """Keep other libraries' notes, and progress bars without a terminal, out of the output. Call it before imports."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _warn_in_one_line() -> None:
    """Show warnings and log messages for users, one line each on stderr, and hide those for developers.

    A command with several engines gets the same warning from each; it is shown once.
    """
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in told:
            told.add(str(message))
            _say(f"warning: {message}")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _say(f"{record.levelname.lower()}: {record.getMessage()}")

    warnings.showwarning = show  # type: ignore[assignment]  # Python allows it
    logger = logging.getLogger("kvgraph")
    logger.handlers = [Handler()]
    logger.propagate = False
