"""What `make soak` makes longer. Tests marked `slow` run there alone; others take more draws, kills or seconds."""

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
SOAK = os.environ.get("KVGRAPH_SOAK", "0") not in ("", "0")


def draws(usual: int) -> int:
    """Examples of a property test that draws `usual` ones in `make test`."""
    return usual * 25 if SOAK else usual


def some(cases: Iterable[T], usual: int) -> list[T]:
    """Parameters of a test: all of them in `make soak`, so many, evenly spread, in `make test`."""
    every = list(cases)
    if SOAK or usual >= len(every):
        return every
    return [every[i * len(every) // usual] for i in range(usual)]
