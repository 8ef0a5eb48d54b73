"""Redis and Valkey: values in parts of a few MiB, written and read in pipelines.

    kvgraph:<fingerprint>:<tenant>:r:<key>               "<bytes> <id>": there is a record, and these are its parts
    kvgraph:<fingerprint>:<tenant>:p:<key>:<id>:<i>      the i-th part

Parts are written first and expire unless their record is written too, so a writer that dies leaves nothing for long. A
record with a part that was evicted is a miss.

User and password are those of the URL, or of the variables KVGRAPH_REDIS_USERNAME and KVGRAPH_REDIS_PASSWORD.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from kvgraph.errors import StoreError
from kvgraph.store.remote.base import LARGEST, Address, Listed, RemoteError, RemoteFull, Space, Whole
from kvgraph.store.remote.store import RemoteStore

if TYPE_CHECKING:
    import redis

P = ParamSpec("P")
T = TypeVar("T")

PART = 8 << 20  # bytes; Redis copies a value as one piece
AT_ONCE = 4  # parts in a pipeline
PIECE = 1 << 20  # bytes of one answer: the client copies an answer while it holds Python's lock, which stops the model
ASKED = 1000  # keys that are listed, or asked for their sizes, at once
EXPIRES = 600_000  # milliseconds until a part without a record goes
REMOVE = (
    "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('UNLINK', KEYS[1]) or 0"  # if it is still the same
)


def open_redis(url: str, fingerprint: str, tenant: str) -> RemoteStore:
    """The store at `redis://[user:password@]host:port/db[?timeout=seconds]`, also `rediss://` and `valkey://`."""
    address = Address.of(url.replace("valkey://", "redis://", 1))
    remote = Redis(address, Space.of(fingerprint, tenant))
    return RemoteStore(remote, "redis", address.shown, fingerprint, address.timeout, tenant)


class Redis:
    """A `kvgraph.store.remote.base.Remote`."""

    def __init__(self, address: Address, space: Space):
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise StoreError("redis:// needs the package redis: pip install 'kvgraph[store]'") from None
        self._redis, self._prefix = redis, _prefix(space)
        credentials = {name: os.environ.get(f"KVGRAPH_REDIS_{name.upper()}") for name in ("username", "password")}
        try:
            self._client: redis.Redis = redis.Redis.from_url(
                address.url,
                **{name: value for name, value in credentials.items() if value},  # those of a URL win
                socket_timeout=address.timeout,
                socket_connect_timeout=address.timeout,
                socket_read_size=PIECE,
                retry=Retry(NoBackoff(), 0),  # trying again is the circuit breaker's business
            )
        except ValueError as error:
            raise StoreError(f"{address.shown} isn't the address of a Redis server: {error}") from None

    def get(self, name: str) -> memoryview | None:
        """Its parts joined; None, and the record removed, if one is gone."""
        return self._asked(self._get, name)

    def _get(self, name: str) -> memoryview | None:
        found = self._record(name)
        if found is None:
            return None
        head, size, parts = found
        try:
            whole = Whole(size)
        except MemoryError:  # whoever wrote the size
            return None
        for at in range(0, len(parts), AT_ONCE):
            pipeline = self._client.pipeline(transaction=False)
            for number, part in enumerate(parts[at : at + AT_ONCE], at):
                length = min(PART, size - number * PART)
                for begin in range(0, length, PIECE):
                    pipeline.getrange(part, begin, min(begin + PIECE, length) - 1)
            for piece in pipeline.execute():
                whole.add(piece)
            if whole.filled != min(size, (at + AT_ONCE) * PART):  # one is gone, or isn't ours
                break
        if whole.filled == size:
            return whole.data()
        self._unlink(name, head, parts)
        return None

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Parts first, then, in one transaction, the record and an end to their expiry. What it replaces goes last."""
        self._asked(self._put, name, parts)

    def _put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        identity, size = os.urandom(8).hex(), sum(len(part) for part in parts)
        names = self._parts(name, identity, size)
        pieces = cut(parts, PART)
        for at in range(0, len(names), AT_ONCE):
            pipeline = self._client.pipeline(transaction=False)
            for part in names[at : at + AT_ONCE]:
                pipeline.set(part, next(pieces), px=EXPIRES)
            pipeline.execute()
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.get(self._head(name))  # another server may have put the same record since this one began
            pipeline.set(self._head(name), f"{size} {identity}")
            for part in names:
                pipeline.persist(part)
            before = self._parsed(name, pipeline.execute()[0])
        if before is not None:
            self._client.unlink(*before[2])

    def contains(self, name: str) -> bool:
        """Whether there is a record; its parts aren't looked at."""
        return bool(self._asked(self._client.exists, self._head(name)))

    def delete(self, name: str) -> bool:
        """The record and its parts."""
        return self._asked(self._delete, name)

    def _delete(self, name: str) -> bool:
        found = self._record(name)
        return found is not None and self._unlink(name, found[0], found[2])

    def _unlink(self, name: str, head: bytes, parts: list[str]) -> bool:
        """Remove a record as it was read: the head of one that has replaced it stays, or its parts would never go."""
        pipeline = self._client.pipeline(transaction=False)  # a full Redis takes no transactions
        pipeline.unlink(*parts)
        pipeline.eval(REMOVE, 1, self._head(name), head)
        return any(pipeline.execute())

    def names(self) -> Iterator[Listed]:
        """By scanning the server's keys. A record's value isn't read, because Redis would count that as a use."""
        head, part = self._head(""), f"{self._prefix}:p:"
        heads: list[str] = []
        parts: dict[str, list[str]] = {}
        for key in self._scanned(f"{self._prefix}:[rp]:*"):
            if key.startswith(head):
                heads.append(key.removeprefix(head))
            else:
                parts.setdefault(key.removeprefix(part).partition(":")[0], []).append(key)
        for at in range(0, len(heads), ASKED):
            some = heads[at : at + ASKED]
            sizes = self._all("strlen", [p for name in some for p in parts.get(name, ())])
            idle = self._all("object idletime", [self._head(name) for name in some], strict=False)
            now = time.time()
            for name, seconds in zip(some, idle, strict=True):
                size = sum(next(sizes) for _ in parts.get(name, ()))
                first = next((part for part in parts.get(name, ()) if part.endswith(":0")), "")
                yield Listed(name, size, now - seconds if isinstance(seconds, int) else None, first)

    def start(self, listed: Listed, size: int) -> bytes | None:
        """From its first part: a use of that is none of the record, whose head Redis knows the last use of."""
        found = self._asked(self._client.getrange, listed.at, 0, size - 1)
        return found if isinstance(found, bytes) and found else None

    def leftovers(self, remove: bool) -> int:
        """Parts that don't expire and aren't their record's: it was evicted, or a server was killed while it removed it."""
        keys, count = list(self._scanned(f"{self._prefix}:p:*:*:*")), 0
        for at in range(0, len(keys), ASKED):
            some = keys[at : at + ASKED]
            lasting = [key for key, left in zip(some, self._all("pttl", some), strict=True) if left == -1]
            # Asked only now: what doesn't expire had a record then, so without one it was replaced or removed.
            heads = self._all("get", [self._head(key.split(":")[4]) for key in lasting])
            lost = [key for key, head in zip(lasting, heads, strict=True) if not _is_of(key, head)]
            count += len(lost)
            if remove and lost:
                self._asked(self._client.unlink, *lost)
        return count

    def spaces(self) -> Iterator[Space]:
        """By scanning the server's keys."""
        found = {Space.read(*key.split(":")[1:3]) for key in self._scanned("kvgraph:*:*:[rp]:*")}
        yield from sorted(space for space in found if space is not None)

    def within(self, space: Space) -> Redis:
        """The same client, with other keys."""
        other = copy.copy(self)
        other._prefix = _prefix(space)
        return other

    def _scanned(self, pattern: str) -> Iterator[str]:
        """Keys of a pattern, each once."""
        seen: set[str] = set()
        cursor = 0
        while True:
            cursor, keys = self._asked(self._client.scan, cursor, match=pattern, count=ASKED)
            for key in keys:
                name = key if isinstance(key, str) else key.decode("utf-8", "replace")
                if name not in seen:
                    seen.add(name)
                    yield name
            if cursor == 0:
                return

    def _all(self, command: str, keys: Sequence[str], strict: bool = True) -> Iterator[Any]:
        """The answers of a command for each of the keys, in pipelines. strict: an error is raised, not given back."""
        for at in range(0, len(keys), ASKED):
            pipeline = self._client.pipeline(transaction=False)
            for key in keys[at : at + ASKED]:
                pipeline.execute_command(*command.upper().split(), key)  # type: ignore[no-untyped-call]
            yield from self._asked(pipeline.execute, raise_on_error=strict)

    def close(self) -> None:
        """Close all connections; a later call opens new ones."""
        self._client.close()
        self._client.connection_pool.disconnect()

    def _asked(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except self._redis.exceptions.OutOfMemoryError as error:
            raise RemoteFull("it is full (maxmemory)") from error
        except (self._redis.RedisError, OSError) as error:
            raise RemoteError(_why(error)) from error

    def _record(self, name: str) -> tuple[bytes, int, list[str]] | None:
        return self._parsed(name, self._client.get(self._head(name)))

    def _parsed(self, name: str, head: object) -> tuple[bytes, int, list[str]] | None:
        """(its head, bytes, names of the parts) of a record, from what is kept as its head."""
        if not isinstance(head, bytes):
            return None
        size, _, identity = head.decode("ascii", "replace").partition(" ")
        if not (size.isdigit() and len(size) < 15 and 0 < int(size) <= LARGEST and identity):
            return None
        return head, int(size), self._parts(name, identity, int(size))

    def _head(self, name: str) -> str:
        return f"{self._prefix}:r:{name}"

    def _parts(self, name: str, identity: str, size: int) -> list[str]:
        return [f"{self._prefix}:p:{name}:{identity}:{i}" for i in range(-(-size // PART))]


def _prefix(space: Space) -> str:
    """Of all keys that are read, written or deleted."""
    return ":".join(("kvgraph", *space))


def _is_of(part: str, head: object) -> bool:
    """Whether a part has the id that is in a record's head."""
    return isinstance(head, bytes) and head.decode("ascii", "replace").partition(" ")[2] == part.split(":")[5]


def cut(parts: Sequence[bytes | memoryview], size: int) -> Iterator[bytes]:
    """The parts, one after the other, as pieces of `size` bytes; the last may be shorter."""
    piece = bytearray()
    for part in parts:
        view = memoryview(part)
        while len(view):
            taken = view[: size - len(piece)]
            piece += taken
            view = view[len(taken) :]
            if len(piece) == size:
                yield bytes(piece)
                piece = bytearray()
    if piece:
        yield bytes(piece)


def _why(error: Exception) -> str:
    """One line. What redis-py says names host and port, never a password."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
