"""The data of a run: weighted components, drawn in an order that depends only on the seed and the counts so far.

Therefore the whole state of the data is the number of examples drawn from each component. It is small, saved with every
checkpoint, and enough to resume exactly, in one process or in many.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvgraph import methods
from kvgraph.data import prompt
from kvgraph.data.chat import Document
from kvgraph.data.task import Item
from kvgraph.data.tasks.world import WORLD_CHUNKS, WORLD_HOPS
from kvgraph.data.world.names import HELD_OUT_SPLIT, TRAIN
from kvgraph.data.world.world import CHUNKS, World
from kvgraph.edges import named_edges
from kvgraph.errors import GraphError, PlanError
from kvgraph.graph import ContextGraph, Edge
from kvgraph.methods import Method
from kvgraph.train.config import Component, TrainError
from kvgraph.train.distill import everything, taught
from kvgraph.train.example import Example
from kvgraph.train.pack import Packed, lay

ENDLESS = 1 << 62
MISSES = 1000  # examples in a row that don't fit, before a mixture gives up
VALIDATION = "validation"


class Source(Protocol):
    """Examples by number; None for one that can't be used. An endless source has length `ENDLESS`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example | None: ...


class Drawn(NamedTuple):
    """An example as one method lays it out, with its component. taught: the layout for a distillation's teacher."""

    component: str
    example: Example
    method: Method
    laid: Packed
    taught: Packed | None = None


class Attempt(NamedTuple):
    """The choice of an example: number `number` of component number `component`, and random numbers for further draws."""

    component: int
    number: int
    rng: random.Random


class WorldSource:
    """Corpora of the synthetic world as examples, with the prompts of the evaluation tasks `world-hops`, `world-chunks`.

    text: "hops,entities=2-4", a kind and settings as `World.parse` reads them. held_out: with names never trained on.
    """

    def __init__(self, text: str, tokenizer: Any, seed: int, *, held_out: bool = False):
        kind, _, settings = text.partition(",")
        split = HELD_OUT_SPLIT if held_out else TRAIN
        self.world = World.parse(kind, ",".join(filter(None, (f"split={split},seed={seed}", settings))))
        self.task = WORLD_CHUNKS if kind == CHUNKS else WORLD_HOPS
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        corpus = self.world.corpus(index)
        documents = tuple(Document(segment.text) for segment in corpus.segments)
        asked = [Item("", q.text, (q.answer,), documents) for q in corpus.questions]
        graph = prompt.build(self.task, asked[0], self.tokenizer).graph(corpus.edges).tokenized(self.encode)
        answers = [self.encode(f"{question.answer}.") for question in corpus.questions]
        queries = [self.encode(prompt.build(self.task, item, self.tokenizer).query) for item in asked]
        return Example(graph.with_query(()), list(zip(queries, answers, strict=True)))

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


def open_source(
    component: Component, folder: str | Path, tokenizer: Any, seed: int, split: str, max_tokens: int | None = None
) -> Source:
    """The source of a component, for training or (split "validation") for evaluation.

    max_tokens: the maximum of an example of prepared data, before its method adds tokens; see `kvgraph.train.records.example`.
    """
    if component.source.startswith("world:"):
        text = component.source.removeprefix("world:")
        return WorldSource(text, tokenizer, seed, held_out=split == VALIDATION)
    from kvgraph.train.records import Records

    path = Path(folder).expanduser() / component.source
    return Records(path, split, tokenizer, max_tokens=max_tokens, recite=component.recite)


def nothing_fits(length: int, limit: int) -> TrainError:
    """The message when a mixture gives up. limit: the number of positions of the model."""
    if limit <= length:
        return TrainError(f"no example of {MISSES:,} fits the model's {limit:,} positions; prepare shorter ones")
    return TrainError(f"no example of {MISSES:,} fits {length:,} tokens; raise `length`, or prepare shorter ones")


class Mixture:
    """Draws examples of weighted components, laid out by their methods. Examples that don't fit are left out and counted.

    length: maximum tokens of an example. limit: the number of positions of the model. documents: learn documents too.
    distill: lay examples out for a distillation's teacher too. counts: the state of another mixture with the same settings,
    to resume from.
    Draw number n depends only on the seed and n, and a component's i-th example only on the seed and i. Every epoch goes
    through a source once, each time in another order.
    """

    def __init__(
        self,
        components: Sequence[Component],
        sources: Sequence[Source],
        seed: int,
        *,
        length: int,
        limit: int,
        documents: bool = False,
        distill: bool = False,
        counts: Mapping[str, int] | None = None,
    ):
        self.components, self.sources, self.seed = tuple(components), tuple(sources), seed
        self.length, self.limit, self.documents, self.distill = length, limit, documents, distill
        self.counts = {component.name: 0 for component in components} | dict(counts or {})
        self.left_out: dict[str, int] = {component.name: 0 for component in components}
        self._weights = [component.weight for component in components]
        for component, source in zip(components, sources, strict=True):
            for spec in component.methods:
                methods.parse(spec)  # raises what is wrong with it
            if len(source) == 0:
                raise TrainError(f"component {component.name} has no examples in {component.source}")

    def draw(self) -> list[Drawn]:
        """The next example, by one of its component's methods or by every one. Never empty.

        Raises TrainError if a thousand examples in a row don't fit.
        """
        for attempt in islice(self.attempts(), MISSES):
            name = self.components[attempt.component].name
            self.counts[name] += 1
            if drawn := self.made(attempt):
                return drawn
            self.left_out[name] += 1
        raise nothing_fits(self.length, self.limit)

    def attempts(self) -> Iterator[Attempt]:
        """The choices from here on, in order, without making the examples: they don't depend on whether an example fits."""
        counts = dict(self.counts)
        for drawn in count(sum(counts.values())):
            rng = random.Random(f"{self.seed}/{drawn}")
            index = rng.choices(range(len(self.components)), self._weights)[0]
            name = self.components[index].name
            yield Attempt(index, counts[name], rng)
            counts[name] += 1

    def made(self, attempt: Attempt) -> list[Drawn]:
        """The chosen example, by its component's methods; empty if it doesn't fit."""
        component, source = self.components[attempt.component], self.sources[attempt.component]
        example = source[self._place(component.name, attempt.number, len(source))]
        return [] if example is None else self._laid(component, example, attempt.rng)

    def _place(self, name: str, number: int, length: int) -> int:
        """The place, in a source of this length, of a component's example number `number`."""
        if length == ENDLESS:
            return number
        epoch, at = divmod(number, length)
        return int(_order(f"{self.seed}/{name}/{epoch}", length)[at])

    def _laid(self, component: Component, example: Example, rng: random.Random) -> list[Drawn]:
        """The example by its methods; none if it doesn't fit one of them."""
        names, edges = component.methods, rng.choice(component.edges)
        chosen = [methods.parse(name) for name in (names if component.every else (rng.choice(names),))]
        found = []
        for method in chosen:
            if _spells_own_tokens(example, method):
                return []
            told = with_edges(example, edges if method.reads_edges else "none", rng)
            try:
                drawn = self._drawn(component, told, method)
            except (GraphError, PlanError):  # more documents than link tokens, for one
                return []
            for laid in filter(None, (drawn.laid, drawn.taught)):
                if len(laid) > self.length or int(laid.positions.max()) >= self.limit or not len(laid.rows):
                    return []
            found.append(drawn)
        return found

    def _drawn(self, component: Component, told: Example, method: Method) -> Drawn:
        if not self.distill:
            laid = lay(told, method, documents=self.documents, through_links=component.through_links)
            return Drawn(component.name, told, method, laid)
        asked = everything(told)
        laid = lay(asked, method, through_links=component.through_links)
        return Drawn(component.name, told, method, laid, taught(asked, laid))


def _spells_own_tokens(example: Example, method: Method) -> bool:
    """Whether a text contains one of the method's own tokens, which have another meaning."""
    own, graph = set(method.own_tokens), example.graph
    if not own:
        return False
    texts = (*graph.prefix, *graph.segments, *(piece for q in example.questions for piece in (q.query, q.answer)))
    return any(not own.isdisjoint(text) for text in texts)


def with_edges(example: Example, edges: str, rng: random.Random) -> Example:
    """The example with its own edges ("links"), as many random ones ("random"), or others (see `named_edges`)."""
    graph = example.graph
    if edges == "links":
        return example
    made = _shuffled(graph, rng) if edges == "random" else named_edges(edges, graph.names)
    if made == graph.edges:
        return example
    return Example(ContextGraph(graph.segments, (), graph.prefix, made, graph.names), example.questions)


def _shuffled(graph: ContextGraph, rng: random.Random) -> tuple[Edge, ...]:
    """The graph's edges with other sources: each reader reads as many segments as before, and different ones where possible."""
    made: list[Edge] = []
    for reader in sorted({reader for _, reader in graph.edges}):
        read = sorted({source for source, to in graph.edges if to == reader} - {reader})
        others = [i for i in range(len(graph.segments)) if i != reader and i not in read]
        sources = [*rng.sample(others, len(others)), *rng.sample(read, len(read))]
        made += [(source, reader) for source in sources[: len(read)]]
    return tuple(made)


@lru_cache(maxsize=16)
def _order(key: str, length: int) -> np.ndarray:
    """A permutation of range(length), the same for the same key."""
    digest = random.Random(key).getrandbits(128)
    return np.random.Generator(np.random.PCG64(digest)).permutation(length)


def validation(
    components: Sequence[Component], sources: Sequence[Source], seed: int, examples: int, **sizes: Any
) -> Iterator[list[Drawn]]:
    """The evaluation set of a run: up to `examples` of every component, by each of its methods; the same every time.

    No example occurs twice. A component of which nothing fits has none.
    """
    for component, source in zip(components, sources, strict=True):
        for spec in component.methods:
            one = replace(component, name=f"{component.name}/{spec}", methods=(spec,), every=False)
            mixture = Mixture([one], [source], seed, **sizes)
            found: list[Drawn] = []
            for attempt in islice(mixture.attempts(), min(len(source), MISSES + examples)):
                if len(found) == examples:
                    break
                found += mixture.made(attempt)
            yield found
