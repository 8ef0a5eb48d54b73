"""Encoding many texts into a store: in batches, each packed by itself.

How tokens are packed into forwards changes the last bits of their KV. So a batch's records depend on nothing but the
batch: spans that several texts read (a prefix, the sources of a graph's segment) are at hand before, each from the store
or computed alone. Therefore it changes no byte of a store in which processes, or on which of several machines of one
kind, its batches are encoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch

from kvgraph.attention.rows import on_device
from kvgraph.data.corpus import CorpusDocument
from kvgraph.engine.engine import Engine
from kvgraph.engine.request import Request
from kvgraph.errors import KVGraphError, StoreError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method
from kvgraph.plan import Place, Plan, Span
from kvgraph.store.codecs.registry import packed
from kvgraph.store.open import open_store
from kvgraph.store.record import Record
from kvgraph.store.remote.base import RemoteError, RemoteFull
from kvgraph.units import human_size

MOST = 64  # plans in a batch
CHARACTERS = 64_000  # of the texts of a batch, unless it is a single text
TOKENS = 16_000  # of a batch's spans, unless it is a single span
PATIENCE = 180.0  # seconds for which a store that doesn't answer is tried again
PAUSE = 1.0  # seconds before the next try
T = TypeVar("T")


@dataclass
class Done:
    """What encoding did. tokens: computed, and reused as they were stored. stored: bytes written. seconds: at work.

    skipped: lines about texts that can't be encoded; too_long: how many of them for their length. items: texts.
    """

    items: int = 0
    computed: int = 0
    reused: int = 0
    stored: int = 0
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)
    too_long: int = 0

    def add(self, other: Done) -> None:
        """Count what another did too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Items(Protocol):
    """What is to be encoded, as an engine plans it."""

    def plan(self, engine: Engine, item: Any, done: Done) -> Plan | None:
        """The plan whose cached spans an item needs; None, and a line in `done`, for one that can't be encoded."""
        ...

    def targets(self, plan: Plan) -> Sequence[int]:
        """The spans that are the item's own, by index; its other cached spans are what these read."""
        ...


@dataclass(frozen=True)
class Documents:
    """The documents of a corpus, each as a method encodes it before documents read each other."""

    method: Method | None
    prefix: str

    def plan(self, engine: Engine, item: CorpusDocument, done: Done) -> Plan | None:
        """The plan of a graph with this document alone."""
        # The query changes no document. The name is for errors, because every document is the only one of its graph.
        graph = ContextGraph([item.text], [0], self.prefix, names=[item.where]).tokenized(engine.tokenize)
        if not graph.segments[0]:
            done.skipped.append(f"{item.where}: no tokens")
            return None
        plan = engine.plan(graph, self.method, probe=False)
        budget = engine.scheduler.memory.budget
        size = engine.scheduler.memory.most_bytes(span for span in plan.spans if span.cached)
        if plan.highest_position < engine.model.limit and size <= budget:
            return plan
        done.too_long += 1
        done.skipped.append(
            f"{item.where}: {len(graph.segments[0]):,} tokens don't fit the model's {engine.model.limit:,} positions "
            f"or the KV budget of {human_size(budget)}"
        )
        return None

    def targets(self, plan: Plan) -> Sequence[int]:
        """The document's spans."""
        return [i for i, span in enumerate(plan.spans) if span.cached and span.segment is not None]


@dataclass(frozen=True)
class PlannedSpans:
    """Plans whose last cached span alone is to be encoded, see `levels`."""

    def plan(self, engine: Engine, item: Plan, done: Done) -> Plan | None:
        """Itself."""
        return item

    def targets(self, plan: Plan) -> Sequence[int]:
        """The span before the prompt span."""
        return [len(plan.spans) - 2]


def batches(documents: Iterable[CorpusDocument]) -> Iterator[list[CorpusDocument]]:
    """Documents in batches, which the texts alone decide."""
    return _batched(documents, lambda document: len(document.text), CHARACTERS)


def plan_batches(plans: Iterable[Plan]) -> Iterator[list[Plan]]:
    """Plans of `levels` in batches, which the plans alone decide."""
    return _batched(plans, lambda plan: len(plan.spans[-2]), TOKENS)


def _batched(items: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    batch: list[T] = []
    size = 0
    for item in items:
        more = size_of(item)
        if batch and (len(batch) == MOST or size + more > limit):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += more
    if batch:
        yield batch


def levels(plan: Plan) -> list[list[Plan]]:
    """Each cached span of a plan, once, as a plan of its own with what it reads; sources in a level before their readers."""
    keys = plan.keys("")
    depths: list[int] = []
    made: list[list[Plan]] = []
    seen: set[str | None] = set()
    for i, (span, key) in enumerate(zip(plan.spans, keys, strict=True)):
        depths.append(max((depths[place.span] + 1 for place in span.sees), default=0))
        if key is None or key in seen:
            continue
        seen.add(key)
        if depths[i] == len(made):
            made.append([])
        made[depths[i]].append(_alone(plan, i))
    return made


def _alone(plan: Plan, index: int) -> Plan:
    """The plan that encodes one span of a plan, and what it reads."""
    wanted, unseen = {index}, [index]
    while unseen:
        sources = {place.span for place in plan.spans[unseen.pop()].sees} - wanted
        wanted |= sources
        unseen += sources
    new = {old: i for i, old in enumerate(sorted(wanted))}
    kept = [
        replace(plan.spans[i], sees=tuple(place._replace(span=new[place.span]) for place in plan.spans[i].sees))
        for i in sorted(wanted)
    ]
    place = Place(new[index], kept[-1].start, 0, len(kept[-1]))
    return Plan((*kept, Span((0,), (kept[-1].positions[-1] + 1,), (place,), cached=False)))


class Encoder:
    """Encodes batches into a store. store: folders and URLs, fastest first. loading: arguments of `Engine.load`."""

    engine: _Collecting

    def __init__(self, items: Items, store: Sequence[str], **loading: Any):
        self.items = items
        engine = _Collecting.load(**loading)
        assert isinstance(engine, _Collecting)
        self.engine = engine
        self.engine.made = []
        self.store = open_store(list(store), self.engine.fingerprint)
        self._writer = ThreadPoolExecutor(1, "kvgraph-writer")
        self._writing: Future[int] | None = None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(self, batch: Iterable[Any]) -> Done:
        """Encode a batch: what of it isn't stored. Written while the next one is computed; see `flush`.

        Raises StoreError if a record of an earlier batch couldn't be kept, and what ends a request.
        """
        started, done = time.perf_counter(), Done()
        missing: dict[str, Plan] = {}
        plans: list[Plan] = []
        for item in batch:
            done.items += 1
            plan = self.items.plan(self.engine, item, done)
            if plan is None:
                continue
            keys = self.engine.keys(plan)
            own = [i for i in self.items.targets(plan) if keys[i] is not None]
            absent = [i for i in own if keys[i] not in missing and not self.store.contains(str(keys[i]))]
            done.reused += sum(len(plan.spans[i]) for i in own if i not in absent)
            if absent:
                plans.append(plan)
                missing |= dict.fromkeys((str(keys[i]) for i in absent), plan)
        for plan in plans:
            self._bring(plan, missing.keys(), done)
        self._run(plans, done)
        self._write(done)
        done.seconds = time.perf_counter() - started
        return done

    def flush(self) -> int:
        """Wait until all is written; bytes that were since the last call. Raises StoreError for what couldn't be kept."""
        writing, self._writing = self._writing, None
        return 0 if writing is None else writing.result()

    def close(self) -> None:
        """Write what is pending, and let go of the store. Idempotent."""
        self._writer.shutdown()
        self.store.close()

    def _bring(self, plan: Plan, missing: Iterable[str], done: Done) -> None:
        """Have in memory what a plan's own spans read: from the store, or computed one by one."""
        pool, pooling = self.engine.scheduler.memory.pool, self.engine.scheduler.pooling
        for i, key in enumerate(self.engine.keys(plan)):
            if key is None or key in missing or pool.contains(key):
                continue
            found = self.store.get(key)
            if found is not None:
                pool.put(pooling.bring(pooling.read(found[0])))
                continue
            self._run([_alone(plan, i)], done)

    def _run(self, plans: Sequence[Plan], done: Done) -> None:
        """Compute what isn't in memory, of all plans together."""
        requests: list[Request | KVGraphError] = [self.engine.prepare(plan, encode_only=True) for plan in plans]
        with closing(self.engine.run(requests, in_flight=len(requests) + 1)) as outcomes:
            for _, result in outcomes:
                if isinstance(result, KVGraphError):
                    raise result
                done.computed += result.usage.computed_tokens

    def _write(self, done: Done) -> None:
        """Hand what was made to the writer, once it has written what was made before."""
        made, self.engine.made = self.engine.made, []
        done.stored += self.flush()
        if made:
            self._writing = self._writer.submit(self._keep, made)

    def _keep(self, records: list[Record]) -> int:
        codec = self.engine.codec
        if codec.name != "raw":
            records = [record if record.packed else packed(record, codec) for record in records]
        self._put(records)
        return sum(record.stored_bytes for record in records)

    def _put(self, records: list[Record]) -> None:
        """Write records. A place that doesn't answer is tried again for a while: it may be starting anew."""
        deadline = time.monotonic() + PATIENCE
        while errors := self.store.put_all(records):
            lasting = [error for error in errors.values() if not _may_pass(error)]
            if lasting or time.monotonic() > deadline:
                raise (lasting or list(errors.values()))[0]
            records = [record for record in records if record.key in errors]
            time.sleep(PAUSE)


def _may_pass(error: StoreError) -> bool:
    """Whether a record couldn't be kept because its place didn't answer."""
    return isinstance(error.__cause__, RemoteError) and not isinstance(error.__cause__, RemoteFull)


class _Collecting(Engine):
    """An engine without a store, which hands over the records that it makes."""

    made: list[Record]

    def _save(self, record: Record, salt: str) -> None:
        self.made.append(on_device(record, torch.device("cpu")))
