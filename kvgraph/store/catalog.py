"""What maintenance sees of a place: all its records, of every model and tenant. It answers no requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvgraph.store.base import Entry


@dataclass
class VerifyReport:
    """What `verify` found and did.

    good, bytes: number of good records, and the bytes of their files.
    bad: (key, reason) of records that were damaged or mislabelled.
    unsupported: (key, reason) of records that this version can't read, left alone.
    untrusted: (key, reason) of records that aren't signed with this process's secret, left alone.
    unreadable: (path, reason) of files that couldn't be opened.
    foreign: paths below records/ that aren't the store's, left alone.
    temporary: number of leftovers of dead writers, and of parts without a record.
    rows_added, rows_removed: rows of the index that were missing, or had no file.
    repaired: whether bad records and leftovers were taken away, and the index was repaired.
    """

    good: int = 0
    bytes: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    unsupported: list[tuple[str, str]] = field(default_factory=list)
    untrusted: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    temporary: int = 0
    rows_added: int = 0
    rows_removed: int = 0
    repaired: bool = True

    @property
    def clean(self) -> bool:
        """No record was bad or unreadable."""
        return not (self.bad or self.unreadable)


class Catalog(Protocol):
    """A place's records. Every method may raise StoreError. Nothing but records of kvgraph is ever touched.

    name: the tier's. shown: the place, without credentials.
    """

    name: str
    shown: str

    def entries(self, details: bool = True) -> Iterator[Entry]:
        """Every record, in no order. details: with tokens and codec, where that takes a look at every record."""
        ...

    def read(self, entry: Entry) -> torch.Tensor | None:
        """A record's bytes as they are, uint8 [bytes], unchecked; None if it is gone."""
        ...

    def keep(self, entry: Entry, parts: Sequence[bytes | memoryview]) -> bool:
        """Keep the bytes of a record under its model and tenant; False if there is one, which stays."""
        ...

    def remove(self, entries: Iterable[Entry], seen: Callable[[], object] = ...) -> list[Entry]:
        """Remove those that nobody has pinned meanwhile; returns them. seen: called for each."""
        ...

    def set_pinned(self, entry: Entry, pinned: bool) -> None:
        """Protect a record from eviction and collection, or no longer. Idempotent."""
        ...

    def verify(self, repair: bool = True, seen: Callable[[], object] = ...) -> VerifyReport:
        """Check every record in full. repair: also take bad ones away. seen: called for each."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...
