"""Packages outside kvgraph, as an installer leaves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvgraph.registry import Registry


def declare(folder: Path, package: str, entry_points: str) -> None:
    """Write into a folder of the path what importlib.metadata reads of a package: its name and its entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


@contextmanager
def looked_up_again(registries: Iterable[Registry]) -> Iterator[None]:
    """Within, the registries look for packages as a new process does; afterwards they look again."""

    def forget() -> None:
        for registry in registries:
            registry.__dict__.pop("_added", None)
            registry._loaded.clear()

    forget()
    yield
    forget()
