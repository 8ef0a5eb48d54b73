"""The reference of the Python API: a page for each room of the package, which mkdocstrings fills from the docstrings."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import griffe

PACKAGE = Path(__file__).parents[2] / "kvgraph"
ELSEWHERE = {"cli", "server"}  # used through the command line and HTTP, which have references of their own


class Page(NamedTuple):
    """A generated page: its file, its title in the navigation, and its Markdown."""

    file: str
    title: str
    text: str


@cache
def pages() -> tuple[Page, ...]:
    """The public names first, then the rooms in alphabetical order."""
    rooms = sorted(
        path.stem
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and not path.name.startswith("_")
    )
    return (Page("index.md", "kvgraph", _public()), *(_room(name) for name in rooms if name not in ELSEWHERE))


def _public() -> str:
    """The names that `from kvgraph import ...` gives, each with a link to where it is described."""
    package = griffe.load("kvgraph", search_paths=[PACKAGE.parent])
    lines = ["# `kvgraph`", "", "What `from kvgraph import ...` gives:", "", "| name | |", "|---|---|"]
    for name in sorted(map(str, package.exports or ())):
        member = package.members[name]
        if not isinstance(member, griffe.Alias):
            continue
        found = member.final_target
        summary = found.docstring.value.split("\n\n")[0] if found.docstring else ""
        lines.append(f"| [`{name}`][{found.path}] | {' '.join(summary.split())} |")
    return "\n".join([*lines, "", "The other pages describe the rooms of the package, each with its modules.", ""])


def _room(name: str) -> Page:
    first, *others = _modules(name)
    lines = [f"::: {first}", "    options:", "      heading_level: 1", ""]
    for module in others:
        lines += [f"::: {module}", ""]
    return Page(f"{name}.md", name, "\n".join(lines))


def _modules(room: str) -> Iterator[str]:
    """The modules of a room by their dotted names, its own first; those that begin with an underscore are left out."""
    yield f"kvgraph.{room}"
    for path in sorted((PACKAGE / room).rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if not any(part.startswith("_") for part in parts[:-1]) and not parts[-1].startswith("_"):
            yield ".".join(parts)
        elif parts[-1] == "__init__" and len(parts) > 3:
            yield ".".join(parts[:-1])
