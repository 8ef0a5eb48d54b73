"""The interface under remote tiers: a service on another machine that keeps bytes by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self
from urllib.parse import parse_qsl, urlunsplit

import numpy as np

from kvgraph.errors import StoreError
from kvgraph.places import shown, taken_apart
from kvgraph.store.base import is_key, is_tenant, tenant_id

LARGEST = 1 << 36  # bytes of a record: 64 GiB. What states more is no record
TIMEOUT = 5.0  # seconds that a read may take before the span is computed instead


class RemoteError(Exception):
    """The place couldn't be asked, or gave no answer in time. Nothing is known about what it holds."""


class RemoteFull(RemoteError):
    """The place answers, but keeps no more."""


class Listed(NamedTuple):
    """Something that is kept. used: when it was last read or written, in seconds since the epoch, or None if the place
    doesn't know. Object stores only know when it was written. at: where the place finds its first bytes.
    """

    name: str
    size: int
    used: float | None = None
    at: str = ""


class Space(NamedTuple):
    """A namespace: what a model's and a tenant's records are kept under. No other one is ever read, listed or deleted."""

    fingerprint: str
    tenant: str

    @classmethod
    def of(cls, fingerprint: str, tenant: str = "") -> Space:
        """That of a model and a tenant's salt."""
        return cls(fingerprint or "any", tenant_id(tenant) or "all")

    @classmethod
    def read(cls, *words: str) -> Space | None:
        """A namespace found in a place; None if the words can't be one of ours."""
        if len(words) != 2 or not (is_key(words[0]) or words[0] == "any"):
            return None
        return cls(*words) if is_tenant(words[1]) or words[1] == "all" else None


class Remote(Protocol):
    """Bytes by name. Safe to use from several threads. Every call may raise RemoteError.

    Names are relative: whoever opened the place chose the namespace that they are in, and no call leaves it.
    """

    def get(self, name: str) -> memoryview | bytes | None:
        """The bytes kept under a name, whole, or None. A memoryview is writable and nobody else's."""
        ...

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Keep the parts, one after the other, under a name, in place of what is there. Others see all or nothing."""
        ...

    def contains(self, name: str) -> bool:
        """Whether there is something under a name."""
        ...

    def delete(self, name: str) -> bool:
        """Remove what is kept under a name; whether there was something, as far as the place tells."""
        ...

    def names(self) -> Iterator[Listed]:
        """Everything in the namespace. This is no use of what is listed."""
        ...

    def start(self, listed: Listed, size: int) -> bytes | None:
        """The first bytes of something listed, at most `size`, or None. This is no use of it."""
        ...

    def leftovers(self, remove: bool) -> int:
        """How many pieces in the namespace belong to nothing that is kept and won't go by themselves. remove: they go."""
        ...

    def spaces(self) -> Iterator[Space]:
        """The namespaces in the whole place."""
        ...

    def within(self, space: Space) -> Self:
        """The same place and connections, in another namespace."""
        ...

    def close(self) -> None:
        """Let go of connections. Idempotent."""
        ...


@dataclass(frozen=True)
class Address:
    """A URL taken apart. url: for the client, without our own options. shown: for people, without credentials.

    timeout: seconds of a read, from `?timeout=`.
    """

    url: str
    scheme: str
    shown: str
    timeout: float

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises StoreError for an option that isn't there."""
        parts = taken_apart(url)
        timeout, rest = TIMEOUT, []
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name != "timeout":
                rest.append(f"{name}={value}")
                continue
            try:
                timeout = float(value)
            except ValueError:
                timeout = 0.0
            if not 0 < timeout <= 3600:
                raise StoreError(f"the timeout of {shown(url)} must be seconds, such as ?timeout=2, not {value[:20]!r}")
        return cls(urlunsplit(parts._replace(query="&".join(rest))), parts.scheme, shown(url), timeout)


class Whole:
    """A place for `size` bytes that come in pieces. Large pieces are copied without Python's lock: the model goes on."""

    def __init__(self, size: int):
        self.size, self.filled = size, 0
        self._data = np.empty(size, np.uint8)

    def add(self, piece: Any) -> None:
        """The next piece, a buffer of bytes. What is over the size is dropped."""
        source = np.frombuffer(piece, np.uint8)[: self.size - self.filled]
        np.copyto(self._data[self.filled : self.filled + len(source)], source)
        self.filled += len(source)

    def data(self) -> memoryview:
        """What has come."""
        return self._data[: self.filled].data
