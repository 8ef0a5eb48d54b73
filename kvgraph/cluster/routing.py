"""Which replica a request goes to: the one that most likely has most of its span tokens in memory, unless it is busy.

Every span has an owner among the replicas, by rendezvous hashing: the replica with the highest hash of (span, replica).
When a replica joins, it becomes the owner of its share of the spans; when one leaves, only its spans change owners. The
owner is where a span goes first. Where spans really are is what replicas report.

A request is worth to a replica the tokens of its spans that are there: all of them for a span that the replica reported,
half for one that it owns and didn't report. Of the replicas to which it is worth something, the one to which it is worth most
gets it, unless that one is busy; then the next. A replica is busy if it would hold more than `bound` times the mean number of
requests, and more than a few (consistent hashing with bounded loads, Mirrokni, Thorup, Zadimoghaddam,
https://arxiv.org/abs/1608.01350). If all are busy, the request goes to the less busy of two random replicas (the power of two
choices, Mitzenmacher, https://doi.org/10.1109/71.963420).

Rendezvous hashing is from Thaler and Ravishankar, https://doi.org/10.1109/90.663936.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import xxhash

from kvgraph.errors import KVGraphError

OWNED = 0.5  # what a token of an owned span is worth that the replica hasn't reported; a token that it has counts 1
FEW = 2  # so many requests make no replica busy; without it, a nearly idle cluster would send requests away from their spans


class RoutingError(KVGraphError, RuntimeError):
    """A request can't be routed, or a replica's name or a setting is wrong."""


class Routed(NamedTuple):
    """Where a request goes."""

    replica: str
    by_spans: bool  # False: it went by load alone
    expected: float  # tokens that the replica is expected to have in memory


class SpanRouter:
    """Routes requests by their spans and by the replicas' load. Equal calls in equal order give equal routes.

    Parameters:
        replicas: names of the replicas that are there from the start
        bound: no replica gets a request for its spans if it would then hold more than this many times the mean (rounded up, at
            least two requests)
        remembered: how many reported spans to remember of each replica, the last used ones; must cover its memory
        seed: of the random choices between replicas
    """

    def __init__(
        self, replicas: Iterable[str] = (), *, bound: float = 1.25, remembered: int = 65_536, seed: int = 0
    ) -> None:
        if not 1 <= bound < math.inf:
            raise RoutingError(f"bound is {bound}; it must be a number from 1 on")
        if remembered < 1:
            raise RoutingError(f"remembered is {remembered}; it must be at least 1")
        self.bound = bound
        self.remembered = remembered
        self._random = random.Random(seed)
        self._names: list[str] = []  # sorted, so that the order of joining changes nothing
        self._salts = np.zeros(0, np.uint64)  # of the replicas, in the same order
        self._load: dict[str, int] = {}  # requests routed and not finished
        self._total = 0
        self._held: dict[str, OrderedDict[str, None]] = {}  # replica -> spans that it reported, last used last
        self._holders: dict[str, dict[str, None]] = {}  # the same by span; dicts, as sets have no order
        self._owners: OrderedDict[str, str] = OrderedDict()  # worked out before
        for replica in replicas:
            self.join(replica)

    @property
    def replicas(self) -> tuple[str, ...]:
        """Names of the replicas, sorted."""
        return tuple(self._names)

    def load(self, replica: str) -> int:
        """How many requests were routed to a replica and haven't finished."""
        return self._load[replica]

    def join(self, replica: str) -> None:
        """Add a replica, with nothing in its memory."""
        if replica in self._load:
            raise RoutingError(f"replica {replica!r} has joined already; names must differ")
        self._load[replica] = 0
        self._held[replica] = OrderedDict()
        self._renamed()

    def leave(self, replica: str) -> None:
        """Remove a replica. Its unfinished requests are no longer counted; a replica that isn't there is ignored."""
        if replica not in self._load:
            return
        self._total -= self._load.pop(replica)
        for key in self._held.pop(replica):
            self._drop(key, replica)
        self._renamed()

    def owner(self, key: str) -> str:
        """The replica with the highest hash of (span, replica)."""
        self._need_replicas()
        found = self._owners.get(key)
        if found is None:
            hashes = _mixed(self._salts ^ np.uint64(xxhash.xxh3_64_intdigest(key.encode())))
            found = self._owners[key] = self._names[int(hashes.argmax())]
            if len(self._owners) > self.remembered:
                self._owners.popitem(last=False)
        return found

    def holds(self, key: str) -> bool:
        """Whether any replica reported a span and hasn't evicted it since."""
        return key in self._holders

    def route(self, spans: Mapping[str, int]) -> Routed:
        """Choose the replica for a request with these spans (key -> tokens), and count the request as its load.

        Call `finished` when the request has ended, however it ended.

        Raises:
            RoutingError: there is no replica
        """
        self._need_replicas()
        worth: dict[str, float] = {}
        for key in sorted(spans):  # replicas to which it is worth the same are tried in an order that spans decide
            tokens = spans[key]
            holders = self._holders.get(key, ())
            owner = self.owner(key)
            if owner not in holders:
                worth[owner] = worth.get(owner, 0.0) + OWNED * tokens
            for replica in holders:
                worth[replica] = worth.get(replica, 0.0) + tokens
        most = max(FEW, math.ceil(self.bound * (self._total + 1) / len(self._names)))
        for replica in sorted(worth, key=worth.__getitem__, reverse=True):
            if self._load[replica] < most:
                return self._routed(replica, True, worth[replica])
        replica = self._less_busy()
        return self._routed(replica, False, worth.get(replica, 0.0))

    def finished(self, replica: str) -> None:
        """Count a routed request as ended; of a replica that has left, ignored."""
        if replica not in self._load:
            return
        if not self._load[replica]:
            raise RoutingError(f"replica {replica!r} has no unfinished request; call finished once for each route")
        self._load[replica] -= 1
        self._total -= 1

    def report(self, replica: str, held: Iterable[str] = (), gone: Iterable[str] = ()) -> None:
        """Take a replica's word on its memory: spans that a request just used, and spans evicted since the last report."""
        known = self._held.get(replica)
        if known is None:
            return  # it has left
        for key in gone:
            if key in known:
                del known[key]
                self._drop(key, replica)
        for key in held:
            known[key] = None
            known.move_to_end(key)
            self._holders.setdefault(key, {})[replica] = None
        while len(known) > self.remembered:
            self._drop(known.popitem(last=False)[0], replica)

    def _less_busy(self) -> str:
        """The less busy of two different random replicas."""
        one, *other = self._random.sample(self._names, min(2, len(self._names)))
        return other[0] if other and self._load[other[0]] < self._load[one] else one

    def _routed(self, replica: str, by_spans: bool, expected: float) -> Routed:
        self._load[replica] += 1
        self._total += 1
        return Routed(replica, by_spans, expected)

    def _drop(self, key: str, replica: str) -> None:
        holders = self._holders[key]
        del holders[replica]
        if not holders:
            del self._holders[key]

    def _renamed(self) -> None:
        self._names = sorted(self._load)
        self._salts = _mixed(np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in self._names], np.uint64))
        self._owners.clear()

    def _need_replicas(self) -> None:
        if not self._names:
            raise RoutingError("there is no replica to route to; start one, or wait until one has joined")


def _mixed(x: np.ndarray) -> np.ndarray:
    """Each 64-bit number spread over all 64 bits: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
