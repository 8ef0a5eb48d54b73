"""What a remote tier is built on: a place on another machine that keeps bytes by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class RemoteError(Exception):
    """The place couldn't be asked, or gave no answer in time. Nothing is known about what it holds."""


class Remote(Protocol):
    """Bytes by name. Safe to use from several threads. Every call may raise RemoteError, and none waits longer than the
    deadline that the place was opened with.

    Names are relative: whoever opened the place chose the namespace that they are in, and no call leaves it.
    """

    def get(self, name: str) -> bytearray | None:
        """The bytes kept under a name, whole, or None."""
        ...

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Keep the parts, one after the other, under a name. Others see all of it or nothing."""
        ...

    def contains(self, name: str) -> bool:
        """Whether there is something under a name."""
        ...

    def delete(self, name: str) -> bool:
        """Remove what is kept under a name; whether there was something."""
        ...

    def names(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of everything in the namespace."""
        ...

    def close(self) -> None:
        """Let go of connections. Idempotent."""
        ...
