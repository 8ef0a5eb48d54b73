"""The routes of this process's requests: shared by Ray's request router and by what follows the answers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

from kvgraph.cluster.routing import SpanRouter


class Routes:
    """The routes of this process's requests, by a ticket of each. Ray's router and the event loop have threads of their own."""

    def __init__(self) -> None:
        self._router = SpanRouter()
        self._lock = threading.Lock()
        self._taken: dict[str, str] = {}  # ticket -> replica
        self.counts: Counter[str] = Counter()  # requests routed by "spans" and by "load"

    def members(self, replicas: Iterable[str]) -> None:
        """The replicas that there are now."""
        there = set(replicas)
        with self._lock:
            for name in set(self._router.replicas) - there:
                self._router.leave(name)
            for name in there - set(self._router.replicas):
                self._router.join(name)

    @property
    def replicas(self) -> tuple[str, ...]:
        """Names of the replicas, sorted."""
        return self._router.replicas

    def loads(self) -> dict[str, int]:
        """Requests routed to each replica that haven't ended."""
        with self._lock:
            return {name: self._router.load(name) for name in self._router.replicas}

    def holds(self, key: str) -> bool:
        """Whether a replica reported a span and hasn't evicted it since."""
        with self._lock:
            return self._router.holds(key)

    def take(self, ticket: str, spans: Mapping[str, int]) -> str | None:
        """The replica for a request, None if there is none; a ticket that had one before gives that back."""
        with self._lock:
            self._finished(ticket)
            if not self._router.replicas:
                return None
            routed = self._router.route(spans)
            self.counts["spans" if routed.by_spans else "load"] += 1
            self._taken[ticket] = routed.replica
            return routed.replica

    def finished(self, ticket: str) -> None:
        """A request has ended, however. Idempotent."""
        with self._lock:
            self._finished(ticket)

    def _finished(self, ticket: str) -> None:
        replica = self._taken.pop(ticket, None)
        if replica in self._router.replicas:
            self._router.finished(replica)

    def report(self, replica: str, held: Iterable[str] = (), gone: Iterable[str] = ()) -> None:
        """A replica's word on its memory."""
        with self._lock:
            self._router.report(replica, held, gone)

    def lost(self, replica: str) -> None:
        """A replica has died."""
        with self._lock:
            for ticket in [ticket for ticket, name in self._taken.items() if name == replica]:
                del self._taken[ticket]
            self._router.leave(replica)


ROUTES = Routes()
"""Those of this process. Ray makes the request router itself, so that nothing else can be handed to it."""
