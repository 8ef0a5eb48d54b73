"""The reference of the command line, from the commands themselves.

docs/reference/cli.md holds a comment `<!-- kvgraph NAME -->` for every command; its usage, help and options take the
comment's place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc
from textwrap import dedent
from typing import Any

import typer

from kvgraph.cli import app

MARK = re.compile(r"^<!-- kvgraph ([a-z ]+) -->$", re.MULTILINE)


def commands() -> dict[str, Any]:
    """Every command by its name, such as "store ls". A group that does something by itself is a command too."""
    return dict(_commands(typer.main.get_command(app), ()))


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands") or (path and command.invoke_without_command):
        yield " ".join(path), command
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, (*path, name))


def fill(markdown: str) -> str:
    """The page with every comment replaced. Raises ValueError unless the comments name every command once."""
    there, named = commands(), MARK.findall(markdown)
    if sorted(named) != sorted(there):
        raise ValueError(f"cli.md describes {sorted(named)}, but the commands are {sorted(there)}")
    return MARK.sub(lambda found: described(found[1], there[found[1]]), markdown)


def described(name: str, command: Any) -> str:
    """One command as Markdown: usage, what its help says, its examples, and a table of arguments and options."""
    context = typer.Context(command, info_name=f"kvgraph {name}")
    usage = " ".join([f"kvgraph {name}", *command.collect_usage_pieces(context)])
    text, _, examples = cleandoc(command.help or "").partition("\b")
    records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    rows = [f"| `{names}` | {_cell(meaning)} |" for names, meaning in records]
    return "\n\n".join(
        [
            f"```text\n{usage}\n```",
            *(" ".join(paragraph.split()) for paragraph in text.split("\n\n")),
            f"```sh\n{dedent(examples).strip()}\n```",
            *(["\n".join(["| argument or option | meaning |", "|---|---|", *rows])] if rows else []),
        ]
    )


def _cell(text: str) -> str:
    """Text in a cell of a table, on one line and without Markdown's signs."""
    return " ".join(re.sub(r"([|*_<\\])", r"\\\1", text).split())
