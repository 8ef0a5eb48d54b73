"""No search for garbage where there is none: imports and loading make a million objects, and nearly all of them stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

USUAL = gc.get_threshold()
START = 2_000_000  # objects, more than imports and loading make


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


def starting() -> None:
    """For a command that may load a model: nobody looks for garbage until `started`, or until there are very many objects."""
    gc.set_threshold(START)


def started() -> None:
    """A model is loaded. What there is now stays, and from now on garbage is looked for as usual, if it was postponed."""
    if gc.get_threshold()[0] == START:
        gc.freeze()
        gc.set_threshold(*USUAL)


def never_collected() -> None:
    """Nobody looks for garbage among the objects that there are now. For a process that keeps its model until it ends.

    A search through all of them stops every thread, and so every answer, for about 0.3 seconds.
    """
    gc.collect()
    gc.freeze()
