"""Memory: what KV the engine holds, for whom, and whether one more request fits.

A request is admitted when the worst case of all its spans and of its own KV fits the budget at once. Therefore two
half-admitted requests can never wait for each other. Everything an admitted request may need is *held*: it is pinned in
the pool. The rest of the pool is evicted least recently used first.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvgraph.engine.request import UNCACHED, Encoding, Request
from kvgraph.errors import CapacityError
from kvgraph.store.memory import MemoryStore
from kvgraph.store.record import Record


class Memory:
    """One budget of bytes for the pool of records, the spans being encoded and the requests' own KV.

    per_token: bytes of KV per token. encodings: the spans being encoded now, kept by the scheduler.
    """

    def __init__(self, budget: int, per_token: int, encodings: Mapping[str, Encoding]):
        self.budget, self.per_token = budget, per_token
        self.pool = MemoryStore(budget)
        self.holds: dict[str, tuple[int, int]] = {}  # key -> (bytes, requests that may need it)
        self.row_bytes = 0  # own KV of admitted requests
        self._encodings = encodings

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV held now: the pool, spans being encoded and the requests' own, by capacity."""
        return self.pool.bytes + self._encoding_bytes() + self.row_bytes

    @property
    def spare(self) -> int:
        """Bytes of the budget that no admitted request may need."""
        return self.budget - sum(size for size, _ in self.holds.values()) - self.row_bytes

    def check(self, request: Request) -> None:
        """Raise CapacityError if a request can never fit. It reads no changing state, so it needs no lock."""
        need = sum(self._worst_case(request).values()) + self._own_bytes(request)
        if need > self.budget and request.sequence.to_gather:
            need -= request.sequence.to_gather * self.per_token
            request.sequence.to_gather = 0  # it is slower without a copy, but it runs
        if need > self.budget:
            raise CapacityError(
                f"the request needs {need:,} bytes of KV at once, but the engine's budget is {self.budget:,}; "
                "raise kv_budget, or use fewer documents or a smaller max_tokens"
            )

    def fits(self, request: Request) -> bool:
        """Whether a request fits beside all admitted ones."""
        spans = self._worst_case(request)
        need = sum(b for k, b in spans.items() if k not in self.holds) + self._own_bytes(request)
        return need <= self.spare

    def admit(self, request: Request) -> None:
        """Hold everything a request may need. The request must fit."""
        self.row_bytes += self._own_bytes(request)
        self.make_room(0)
        for key, size in self._worst_case(request).items():
            self._hold(request, key, size)

    def leave(self, request: Request) -> None:
        """Give back a request's own KV. The records that it still holds are given back by `release`."""
        self.row_bytes -= self._own_bytes(request)

    def release(self, request: Request, key: str) -> None:
        """A request no longer needs a record; the record is unpinned when this was the last such request."""
        size, count = self.holds[key]
        request.held.discard(key)
        if count > 1:
            self.holds[key] = (size, count - 1)
            return
        del self.holds[key]
        if key in self.pool:
            self.pool.unpin(key)
            if key.startswith(UNCACHED):  # no other request can ask for it
                self.pool.delete(key)

    def held_bytes(self, request: Request, keys: set[str]) -> int:
        """Bytes of these records and of the request's own KV."""
        return sum(self.holds[k][0] for k in keys) + self._own_bytes(request)

    def pooled(self, key: str) -> Record:
        """A record that is in the pool, as what a row reads is: it is pinned."""
        found = self.pool.get(key)
        assert found is not None, "it must be in the pool"
        return found[0]

    def keep(self, record: Record) -> None:
        """Put a record into the pool, pinned if it is held."""
        self.make_room(0)
        self.pool.put(record)
        if record.key in self.holds:
            self.pool.pin(record.key)

    def make_room(self, size: int) -> None:
        """Evict records that nobody holds until `size` more bytes fit beside all own KV and running encodings."""
        self.pool.evict_to(max(0, self.budget - self.row_bytes - self._encoding_bytes() - size))

    def _encoding_bytes(self) -> int:
        sequences = (e.sequence for e in self._encodings.values())
        return sum(s.kv.nbytes + s.copied for s in sequences if s.kv is not None)

    def _worst_case(self, request: Request) -> dict[str, int]:
        return {k: len(s) * self.per_token for k, s in zip(request.keys, request.plan.spans[:-1], strict=False)}

    def _own_bytes(self, request: Request) -> int:
        if request.encode_only:
            return 0
        return (request.sequence.capacity + request.sequence.to_gather) * self.per_token

    def _hold(self, request: Request, key: str, size: int) -> None:
        _, count = self.holds.get(key, (size, 0))
        self.holds[key] = (size, count + 1)
        request.held.add(key)
        if count == 0 and key in self.pool:
            self.pool.pin(key)
