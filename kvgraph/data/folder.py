"""Folders that one process at a time writes, and that a later one goes on with."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvgraph.errors import KVGraphError


@contextmanager
def errors_named(folder: Path, error: type[KVGraphError]) -> Iterator[None]:
    """What the file system refuses, as one line that says where."""
    try:
        yield
    except OSError as refused:
        where = refused.filename or folder
        raise error(
            f"{where}: {refused.strerror or refused}; put that right and run the same again to go on"
        ) from refused


@contextmanager
def locked(folder: Path, error: type[KVGraphError]) -> Iterator[None]:
    """Holds the folder, which is made if it isn't there, so that two processes can't both append to it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"{folder} is being written by another process; wait for it, or give another folder") from None
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


_held: set[int] = set()  # descriptors of locked folders


def _let_go() -> None:
    """In a forked process: leave the locks to the one that took them, or they would outlive it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
