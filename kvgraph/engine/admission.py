"""Memory: what KV the engine holds, for whom, and whether one more request fits.

A request is admitted when the worst case of all its spans and of its own KV fits the budget at once. Therefore two
half-admitted requests can never wait for each other. Everything an admitted request may need is *held*: it is pinned in
the pool. The rest of the pool is evicted least recently used first.

Records of a lossy codec or a selection may take fewer bytes than the span does while it is encoded. What it takes more
meanwhile is its *extra*: there is room for the largest extra that an admitted request still waits for, and spans whose
extras don't fit beside each other are encoded one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvgraph.engine.pooling import Pooling
from kvgraph.engine.request import UNCACHED, Encoding, Request
from kvgraph.errors import CapacityError
from kvgraph.plan import Span
from kvgraph.store.memory import MemoryStore
from kvgraph.store.record import Record


class Memory:
    """One budget of bytes for the pool of records, the spans being encoded and the requests' own KV.

    per_token: bytes of KV per token. pooling: the form of stored spans' records. encodings: the spans being encoded now,
    kept by the scheduler.
    """

    def __init__(self, budget: int, per_token: int, pooling: Pooling, encodings: Mapping[str, Encoding]):
        self.budget, self.per_token, self.pooling = budget, per_token, pooling
        self.pool = MemoryStore(budget)
        self.holds: dict[str, tuple[int, int]] = {}  # key -> (bytes, requests that may need it)
        self.row_bytes = 0  # own KV of admitted requests
        self._extras: dict[Request, int] = {}  # of admitted requests that may still have spans encoded
        self._encodings = encodings

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV held now: the pool, spans being encoded and the requests' own, by capacity."""
        return self.pool.bytes + self._encoding_bytes() + self.row_bytes

    @property
    def spare(self) -> int:
        """Bytes of the budget that no admitted request may need."""
        return self.budget - self._promised() - self._largest_extra()

    def check(self, request: Request) -> None:
        """Raise CapacityError if a request can never fit. It reads no changing state, so it needs no lock."""
        need = self.most_bytes(self._spans(request).values()) + self._own_bytes(request)
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
        spans = self._spans(request)
        need = sum(self._record_bytes(s) for k, s in spans.items() if k not in self.holds) + self._own_bytes(request)
        return self._promised() + need + max(self._extra_of(request), self._largest_extra()) <= self.budget

    def admit(self, request: Request) -> None:
        """Hold everything a request may need. The request must fit."""
        self._extras[request] = self._extra_of(request)
        for key, span in self._spans(request).items():
            self._hold(request, key, self._record_bytes(span))
        self.row_bytes += self._own_bytes(request)
        self.make_room(0)  # of what nobody holds: what this request reads stays

    def encoded(self, request: Request) -> None:
        """Everything that a request reads is in the pool. Idempotent."""
        self._extras.pop(request, None)

    def leave(self, request: Request) -> None:
        """Give back a request's own KV. The records that it still holds are given back by `release`."""
        self.encoded(request)
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

    def most_bytes(self, spans: Iterable[Span]) -> int:
        """Bytes at most of these spans' records, the last of which is still being encoded."""
        spans = list(spans)
        return sum(map(self._record_bytes, spans)) + max(map(self.extra, spans), default=0)

    def extra(self, span: Span) -> int:
        """Bytes that a span takes while it is encoded, beyond those of its record."""
        return max(0, len(span) * self.per_token - self._record_bytes(span))

    @property
    def room_for_extras(self) -> int:
        """Bytes of extras of spans whose encoding may begin now; those of one span at least, if none is being encoded."""
        return self.budget - self._promised() - self._extra_now()

    def _promised(self) -> int:
        """Bytes of all that is held, and of the requests' own KV."""
        return sum(b for b, _ in self.holds.values()) + self.row_bytes

    def _largest_extra(self) -> int:
        """Bytes of the largest extra that an admitted request may need, or of those in use."""
        return max((*self._extras.values(), self._extra_now()))

    def _extra_of(self, request: Request) -> int:
        return max((self.extra(s) for k, s in self._spans(request).items() if k not in self.pool), default=0)

    def _extra_now(self) -> int:
        return sum(self.extra(e.sequence.span) for e in self._encodings.values() if e.sequence.kv is not None)

    def _record_bytes(self, span: Span) -> int:
        return self.pooling.nbytes(len(span)) if span.cached else len(span) * self.per_token

    def _encoding_bytes(self) -> int:
        sequences = (e.sequence for e in self._encodings.values())
        return sum(s.kv.nbytes + s.copied for s in sequences if s.kv is not None)

    @staticmethod
    def _spans(request: Request) -> dict[str, Span]:
        return dict(zip(request.keys, request.plan.spans[:-1], strict=False))

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
