"""No search for garbage where there is none: imports and loading make a million objects, and nearly all of them stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_collected() -> Iterator[None]:
    """Inside, nobody looks for garbage. Looking again and again through what stays takes a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def never_collected() -> None:
    """Nobody looks for garbage among the objects that there are now. For a process that keeps its model until it ends.

    A search through all of them stops every thread, and so every answer, for about 0.3 seconds.
    """
    gc.collect()
    gc.freeze()
