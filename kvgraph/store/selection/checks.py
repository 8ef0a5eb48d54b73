"""What selections say when their fields are wrong."""

from __future__ import annotations

from kvgraph.errors import StoreError


def percent(name: str, keep: int) -> None:
    """Raise StoreError unless `keep` is 1 to 100."""
    if not 1 <= keep <= 100:
        raise StoreError(f"selection {name} keeps 1 to 100 percent of the tokens, not {keep}")


def observes(name: str, window: int, kernel: int) -> None:
    """Raise StoreError unless a window has 1 or more queries and a kernel an odd number of tokens."""
    if window < 1 or kernel < 1 or kernel % 2 == 0:
        raise StoreError(f"selection {name} needs a window of 1 or more and an odd kernel, not {window} and {kernel}")
