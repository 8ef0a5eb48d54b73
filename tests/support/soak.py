"""What `make soak` makes longer. Tests marked `slow` run there alone; others take more draws, kills or seconds."""

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
SOAK = os.environ.get("KVGRAPH_SOAK", "0") not in ("", "0")


def draws(usual: int, soak: int = 0) -> int:
    """Examples of a property test that draws `usual` ones in `make test`, and `soak`, or 25 times as many, in `make soak`."""
    return (soak or usual * 25) if SOAK else usual


def some(cases: Iterable[T], usual: int, turn: int = 0) -> list[T]:
    """Parameters of a test: all of them in `make soak`, so many, evenly spread, in `make test`.

    turn: at which case to begin, so that tests over the same cases don't all take the same ones.
    """
    every = list(cases)
    if SOAK or usual >= len(every):
        return every
    return [every[(turn + i * len(every) // usual) % len(every)] for i in range(usual)]
