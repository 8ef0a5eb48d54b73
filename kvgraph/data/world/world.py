"""A synthetic world: small corpora of short sentences in which the need for a capability can be switched on.

- *hops*: people, firms and cities, one document each. A question needs one document, two or three in a row, or compares
  two.
- *chunks*: documents about entities of one kind, each cut into segments. The first names its entity ("Romi is a
  person."), the later ones don't ("She serves Brepu."). Only their order or their edges tell whom they are about.

All names are invented (`kvgraph.data.world.names`), and all facts are drawn anew for every corpus, so nothing can be
known from another one. In a corpus no two statements of a relation have the same value. Therefore answers are unique,
and the probability that a guess is right is one over the number of statements (`WorldQuestion.floor`).

Everything depends only on the seed and the corpus' number. Settings that change how a corpus is written (order, edges,
prefixes) don't change its questions, so that answers can be compared question by question.
Pure Python.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, NamedTuple

from kvgraph.data.world.names import HELD_OUT_SPLIT, MOST, SPLITS, Dealer
from kvgraph.errors import KVGraphError

HOPS, CHUNKS = KINDS = ("hops", "chunks")
KEPT, SHUFFLED, SORTED = ORDERS = ("kept", "shuffled", "sorted")
TRUE, DROPPED, RANDOM, WRONG, REVERSED = EDGES = ("true", "dropped", "random", "wrong", "reversed")
NONE, ID, NAME = PREFIXES = ("none", "id", "name")
COMPARISON, NAMED, PRONOUN = "comparison", "named", "pronoun"
CHAINS = {"1-hop": 1, "2-hop": 2, "3-hop": 3}  # how many documents in a row
TYPES = {HOPS: (*CHAINS, COMPARISON), CHUNKS: (NAMED, PRONOUN)}
ENTITIES = {
    HOPS: (2, 6),
    CHUNKS: (4, 6),
}  # of each kind in a corpus by default, which gives 6-18 documents, 8-18 chunks

PERSON, FIRM, CITY = "person", "firm", "city"
AGAIN = {PERSON: "She", FIRM: "The firm", CITY: "That city"}
YEAR = "dates"  # the relation whose values are years
YEARS = tuple(str(year) for year in range(1800, 1864))
IDS = tuple(f"d{i}" for i in range(24))
# relation -> the kind of its values; None for a year or a name that isn't an entity's
HOP_RELATIONS: Mapping[str, Mapping[str, str | None]] = {
    PERSON: {"inhabits": CITY, "serves": FIRM, YEAR: None},
    FIRM: {"occupies": CITY, "makes": None},
    CITY: {"joins": None, "adjoins": None},
}
# kind -> (the relation stated with the name, those stated later)
CHUNK_RELATIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    PERSON: (YEAR, ("serves", "inhabits", "likes")),
    FIRM: ("occupies", ("makes", "hires", "sells")),
    CITY: ("joins", ("adjoins", "borders", "hosts")),
}
NAMES = {HOPS: 6, CHUNKS: 5}  # at most, for one entity of each kind and its values


class WorldError(KVGraphError, ValueError):
    """A setting of a world is unknown or out of range. The message names it and says what is allowed."""


class WorldSegment(NamedTuple):
    """A document, or a chunk of one. entity: its subject. named: whether it names this. relations: those it states."""

    id: str
    text: str
    entity: str
    kind: str
    named: bool
    relations: tuple[str, ...]


class WorldQuestion(NamedTuple):
    """A cloze ("Romi serves") or a comparison, and what is needed to answer it.

    gold: the segments that must be read, by index; the one with the answer is last.
    floor: how often a guess is right that knows the relation asked for but not the subject.
    edges_say: the answer that follows from the edges, if they say anything; with "wrong" edges a wrong answer.
    """

    kind: str
    text: str
    answer: str
    gold: tuple[int, ...]
    floor: float
    edges_say: str = ""


@dataclass(frozen=True)
class Corpus:
    """Segments in reading order, edges (source, reader) between them by index, and questions. str() shows it."""

    id: str
    segments: tuple[WorldSegment, ...]
    edges: tuple[tuple[int, int], ...]
    questions: tuple[WorldQuestion, ...]

    def __str__(self) -> str:
        sources: dict[int, list[int]] = {}
        for source, reader in self.edges:
            sources.setdefault(reader, []).append(source)
        told = [
            f"{i:>3}  {'reads ' + ','.join(map(str, sources[i])) if i in sources else '':<12}  {segment.text}"
            for i, segment in enumerate(self.segments)
        ]
        asked = [
            f"  {question.kind:<10}  {question.text} -> {question.answer}"
            f"   (segments {','.join(map(str, question.gold))}; floor {100 * question.floor:.0f} %)"
            for question in self.questions
        ]
        return "\n".join([self.id, *told, "", *asked])


@dataclass(frozen=True)
class World:
    """The settings of a world. `corpus(i)` is its corpus number i; iterating gives the first `count`.

    kind: "hops" or "chunks".
    split: whether names are from the half for training, or held out.
    seed, count: the seed, and the number of corpora.
    entities: smallest and largest number per corpus (of each kind in hops); ENTITIES unless given.
    questions: maximum number per corpus.
    types: of questions, drawn uniformly; a type given twice is drawn twice as often.
    order (chunks): "kept" puts documents in random order, each with its chunks in order; "shuffled" shuffles all
        chunks; "sorted" shuffles them, then puts each after the naming chunk that an edge joins it with.
    edges: the "true" ones, or a `share` of them changed. True edges let the later chunks of a document read its naming
        chunk; in hops, a document is read by those that mention its entity. Changed edges are "dropped", come at
        "random" from any other segment, are "wrong" (from the naming segment of another entity of the same kind, always
        the same one), or "reversed".
    prefix (chunks): plain text before every chunk: "none", the "id" of its document, or the "name" of its entity, as
        far as the edges tell.
    statements (chunks): maximum per chunk, 1 to 3; a longer chunk is cut into several.

    Raises WorldError for an unknown setting, or one that doesn't fit the others.
    """

    kind: str = HOPS
    split: str = HELD_OUT_SPLIT
    seed: int = 0
    count: int = 100
    entities: tuple[int, int] = (0, 0)
    questions: int = 8
    types: tuple[str, ...] = ()
    order: str = KEPT
    edges: str = TRUE
    share: float = 1.0
    prefix: str = NONE
    statements: int = 3

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        object.__setattr__(self, "entities", tuple(self.entities) if any(self.entities) else ENTITIES[self.kind])
        object.__setattr__(self, "types", tuple(self.types) or TYPES[self.kind])
        for name, known in (("split", SPLITS), ("order", ORDERS), ("edges", EDGES), ("prefix", PREFIXES)):
            _one_of(name, getattr(self, name), known)
        for name in self.types:
            _one_of("types", name, TYPES[self.kind])
        for name in ("count", "questions"):
            if getattr(self, name) < 1:
                raise WorldError(f"{name} is {getattr(self, name)}; it must be at least 1")
        few, many = self.entities
        if not 2 <= few <= many:
            raise WorldError(
                f"entities is {few}-{many}; give two numbers, the first at least 2 and the second no lower"
            )
        if many * NAMES[self.kind] > MOST:
            raise WorldError(f"a corpus of {self.kind} has at most {MOST // NAMES[self.kind]} entities of a kind")
        if not 0 < self.share <= 1 or (self.share < 1 and self.edges == TRUE):
            raise WorldError(f"share is {self.share}; it is the share of edges to change, above 0 and at most 1")
        if not 1 <= self.statements <= 3:
            raise WorldError(f"statements is {self.statements}; a chunk has at most 1, 2 or 3")
        if self.kind == HOPS and (self.order, self.prefix) != (KEPT, NONE):
            raise WorldError(
                "order and prefix are for chunks; documents of hops have one segment, which names its entity"
            )

    @classmethod
    def parse(cls, kind: str, text: str = "") -> World:
        """The world of a text such as "order=shuffled,edges=wrong,entities=4-6,types=1-hop+2-hop".

        Raises WorldError, listing the known settings, for others.
        """
        known = [f.name for f in fields(cls) if f.name != "kind"]
        found: dict[str, Any] = {}
        for item in filter(None, text.split(",")):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or name not in known:
                raise WorldError(f"{item[:60]!r} isn't a setting; give NAME=VALUE with one of {', '.join(known)}")
            found[name] = _parsed(name, value)
        return cls(kind, **found)

    def __iter__(self) -> Iterator[Corpus]:
        return map(self.corpus, range(self.count))

    def corpus(self, index: int) -> Corpus:
        """Corpus number `index`; it doesn't depend on which were made before."""
        return _Teller(self, index).corpus()


def records(world: World) -> Iterator[dict[str, Any]]:
    """The world's questions as records of the evaluation tasks `world-hops` and `world-chunks`, ready to be JSON."""
    settings: dict[str, Any] = {"edges": world.edges if world.share == 1 else f"{world.edges} {world.share:g}"}
    if world.kind == CHUNKS:
        settings |= {"order": world.order, "prefix": world.prefix}
    for corpus in world:
        documents = [{"id": segment.id, "text": segment.text} for segment in corpus.segments]
        for number, question in enumerate(corpus.questions):
            facts: dict[str, Any] = {"floor": question.floor, "gold_position": question.gold[-1], **settings}
            facts |= {"gold_positions": ",".join(map(str, sorted(question.gold)))}
            facts |= {"distractors": len(documents) - len(question.gold)}
            facts |= {"hops": CHAINS[question.kind]} if question.kind in CHAINS else {}
            facts |= {"edges_say": question.edges_say} if question.edges_say else {}
            yield {
                "id": f"{corpus.id}/{number}",
                "corpus": corpus.id,
                "kind": question.kind,
                "question": question.text,
                "answer": question.answer,
                "documents": documents,
                "edges": [list(edge) for edge in corpus.edges],
                "facts": facts,
            }


def words() -> list[str]:
    """Every word and sign in the sentences, without names."""
    relations = {r for kind in HOP_RELATIONS.values() for r in kind}
    relations |= {r for first, later in CHUNK_RELATIONS.values() for r in (first, *later)}
    said = {word for again in AGAIN.values() for word in again.split()}
    question = _comparison("", "").replace(",", " ").replace("?", " ").split()
    return [*".,:?", *sorted({"is", "a", "what", *AGAIN, *said, *question, *relations}), *IDS, *YEARS]


# -- who does what ----------------------------------------------------------------------------------------------------

Asked = tuple[str, str]  # (entity, relation)


class _Entity(NamedTuple):
    """One entity. parts: the relations that each of its segments states, in order."""

    name: str
    kind: str
    facts: Mapping[str, str]
    parts: tuple[tuple[str, ...], ...]


class _Draft(NamedTuple):
    """A question before the segments have an order. needs: the statements it needs; the one with the answer is last."""

    kind: str
    text: str
    answer: str
    needs: tuple[Asked, ...]


def _people_firms_cities(rng: random.Random, dealer: Dealer, years: list[str], count: int) -> list[_Entity]:
    """`count` people, firms and cities. Nobody shares a firm or a city with another of the same kind."""
    named = {kind: dealer.deal(rng, count) for kind in HOP_RELATIONS}
    made = []
    for kind, relations in HOP_RELATIONS.items():
        values = {}
        for relation, of in relations.items():
            values[relation] = _values(rng, dealer, years, relation, count) if of is None else _shuffled(rng, named[of])
        for i, name in enumerate(named[kind]):
            facts = {relation: values[relation][i] for relation in relations}
            made.append(_Entity(name, kind, facts, (tuple(_shuffled(rng, list(facts))),)))
    return made


def _cut(rng: random.Random, dealer: Dealer, years: list[str], count: int, kind: str, statements: int) -> list[_Entity]:
    """`count` entities of a kind in chunks: one that names it, then one with 1 to 3 relations, or two with all three.
    There are more chunks if these would exceed the maximum of statements.

    The first two entities get two chunks, so that every relation is stated at least twice. A relation stated once could
    be answered without the name.
    """
    first, later = CHUNK_RELATIONS[kind]
    names = dealer.deal(rng, count)
    values = {relation: _values(rng, dealer, years, relation, count) for relation in (first, *later)}
    made = []
    for i, name in enumerate(names):
        told = _shuffled(rng, later)
        cut = rng.choice((1, 2))
        two = i < 2 or rng.random() < 0.5
        parts = [told[:cut], told[cut:]] if two else [told[: rng.choice((1, 2, 3))]]
        facts = {relation: values[relation][i] for relation in (first, *(r for part in parts for r in part))}
        parts = [part[j : j + statements] for part in parts for j in range(0, len(part), statements)]
        made.append(_Entity(name, kind, facts, ((first,), *map(tuple, parts))))
    return made


def _values(rng: random.Random, dealer: Dealer, years: list[str], relation: str, count: int) -> list[str]:
    return [years.pop() for _ in range(count)] if relation == YEAR else dealer.deal(rng, count)


def _shuffled(rng: random.Random, items: Sequence[Any]) -> list[Any]:
    return rng.sample(items, len(items))


# -- what can be asked ------------------------------------------------------------------------------------------------


def _chains(entities: Sequence[_Entity]) -> Iterator[_Draft]:
    """All questions along relations: "Romi serves what makes"."""
    by_name = {entity.name: entity for entity in entities}

    def paths(entity: _Entity, length: int) -> Iterator[tuple[tuple[_Entity, str], ...]]:
        for relation, value in entity.facts.items():
            if length == 1:
                yield ((entity, relation),)
            elif value in by_name:
                yield from (((entity, relation), *rest) for rest in paths(by_name[value], length - 1))

    for kind, length in CHAINS.items():
        for entity in entities:
            for path in paths(entity, length):
                (_, first), *rest = path
                text = f"{entity.name} {first}" + "".join(f" what {relation}" for _, relation in rest)
                last, relation = path[-1]
                yield _Draft(kind, text, last.facts[relation], tuple((e.name, r) for e, r in path))


def _comparisons(rng: random.Random, entities: Sequence[_Entity]) -> Iterator[_Draft]:
    """Which of two people is earlier: every pair once, in either order."""
    people = [entity for entity in entities if entity.kind == PERSON]
    for pair in combinations(people, 2):
        one, other = _shuffled(rng, pair)
        later, earlier = sorted(pair, key=lambda person: person.facts[YEAR], reverse=True)
        text = _comparison(one.name, other.name)
        yield _Draft(COMPARISON, text, earlier.name, ((later.name, YEAR), (earlier.name, YEAR)))


def _comparison(one: str, other: str) -> str:
    return f"Who is earlier, {one} {YEAR} or {other} {YEAR}?"


def _clozes(entities: Sequence[_Entity]) -> Iterator[_Draft]:
    """Every statement of the chunks, asked for by the entity's name."""
    for entity in entities:
        for part, relations in enumerate(entity.parts):
            kind = PRONOUN if part else NAMED
            for r in relations:
                yield _Draft(kind, f"{entity.name} {r}", entity.facts[r], ((entity.name, r),))


# -- how it is written ------------------------------------------------------------------------------------------------


class _Teller:
    """One corpus being made. Each choice has its own stream of random numbers, so that none affects another."""

    def __init__(self, world: World, index: int):
        self.world = world
        self.id = f"{world.kind}-{world.split}-{world.seed}-{index}"

    def corpus(self) -> Corpus:
        everyone = self._entities()
        drafts = self._drafts(everyone)
        told = self._ordered(everyone)
        edges = self._edges(told, everyone)
        if self.world.order == SORTED:
            order = _sorted_by(told, _joined(told, edges))
            told, edges = [told[i] for i in order], [(order.index(s), order.index(r)) for s, r in edges]
        edges = sorted(edges, key=lambda edge: edge[::-1])
        joined = _joined(told, edges)
        questions = tuple(self._question(draft, told, joined, everyone) for draft in drafts)
        return Corpus(self.id, tuple(self._prefixed(told, joined)), tuple(edges), questions)

    def _rng(self, what: str) -> random.Random:
        return random.Random(f"{self.id} {what}")

    def _entities(self) -> list[_Entity]:
        rng, dealer = self._rng("facts"), Dealer(self.world.split)
        years = _shuffled(rng, YEARS)
        count, kind = rng.randint(*self.world.entities), rng.choice(tuple(CHUNK_RELATIONS))
        if self.world.kind == HOPS:
            return _people_firms_cities(rng, dealer, years, count)
        return _cut(rng, dealer, years, count, kind, self.world.statements)

    def _drafts(self, entities: list[_Entity]) -> list[_Draft]:
        """The questions, all different."""
        rng = self._rng("questions")
        if self.world.kind == HOPS:
            every = [*_chains(entities), *_comparisons(rng, entities)]
        else:
            every = list(_clozes(entities))
        left = {kind: [draft for draft in every if draft.kind == kind] for kind in self.world.types}
        drawn: list[_Draft] = []
        while len(drawn) < self.world.questions:
            kinds = [kind for kind in self.world.types if left[kind]]
            if not kinds:
                break
            found = left[rng.choice(kinds)]
            drawn.append(found.pop(rng.randrange(len(found))))
        return drawn

    def _unit(self, entity: _Entity, part: int) -> tuple[str, int]:
        """What moves together: a document, or a segment if these are shuffled."""
        return entity.name, 0 if self.world.order == KEPT else part

    def _ordered(self, entities: list[_Entity]) -> list[WorldSegment]:
        """All segments, units in random order."""
        units: dict[tuple[str, int], list[WorldSegment]] = {}
        for entity in entities:
            for part in range(len(entity.parts)):
                units.setdefault(self._unit(entity, part), []).append(self._segment(entity, part))
        order = _shuffled(self._rng("order"), list(units.values()))
        return [segment for unit in order for segment in unit]

    def _segment(self, entity: _Entity, part: int) -> WorldSegment:
        named = part == 0
        subject = entity.name if named else AGAIN[entity.kind]
        sentences = [f"{subject} {relation} {entity.facts[relation]}." for relation in entity.parts[part]]
        if named and self.world.kind == CHUNKS:
            sentences.insert(0, f"{subject} is a {entity.kind}.")
        id = f"{self.id}/{entity.name}" + (f".{part}" if self.world.kind == CHUNKS else "")
        return WorldSegment(id, " ".join(sentences), entity.name, entity.kind, named, entity.parts[part])

    def _edges(self, told: Sequence[WorldSegment], entities: Sequence[_Entity]) -> list[tuple[int, int]]:
        """The true edges, then as many of them changed as the world says."""
        naming = {segment.entity: i for i, segment in enumerate(told) if segment.named}
        facts = {entity.name: entity.facts for entity in entities}
        true = []
        for reader, segment in enumerate(told):
            mentioned = [segment.entity, *(facts[segment.entity][relation] for relation in segment.relations)]
            true += [(naming[name], reader) for name in mentioned if naming.get(name, reader) != reader]
        if self.world.edges == TRUE:
            return true
        rng = self._rng("edges")
        changed = set(rng.sample(range(len(true)), round(self.world.share * len(true))))
        others = _next_of_kind(rng, told)
        edges: list[tuple[int, int]] = []
        for i, (source, reader) in enumerate(true):
            if i not in changed:
                edges.append((source, reader))
            elif self.world.edges == WRONG:
                edges.append((others[source], reader))
            elif self.world.edges == REVERSED:
                edges.append((reader, source))
            elif self.world.edges == RANDOM:
                taken = {reader, *(s for s, r in (*true, *edges) if r == reader)}
                edges.append((rng.choice([s for s in range(len(told)) if s not in taken]), reader))
        return edges

    def _prefixed(self, told: Sequence[WorldSegment], joined: Mapping[int, int]) -> Iterator[WorldSegment]:
        """The segments with their prefixes; there is none if no edge tells whose document a segment is of."""
        ids = dict(zip((s.entity for s in told if s.named), self._rng("ids").sample(IDS, len(IDS)), strict=False))
        for i, segment in enumerate(told):
            entity = told[joined[i]].entity if i in joined else None
            if self.world.prefix == NONE or entity is None:
                yield segment
            else:
                prefix = ids[entity] if self.world.prefix == ID else entity
                yield segment._replace(text=f"{prefix}: {segment.text}")

    def _question(
        self, draft: _Draft, told: Sequence[WorldSegment], joined: Mapping[int, int], entities: Sequence[_Entity]
    ) -> WorldQuestion:
        name, relation = draft.needs[-1]
        naming = next(i for i, s in enumerate(told) if s.named and s.entity == name)
        gold = [next(i for i, s in enumerate(told) if _states(s, need)) for need in draft.needs]
        if draft.kind == COMPARISON:
            return WorldQuestion(draft.kind, draft.text, draft.answer, tuple(gold), 0.5)
        floor = 1 / sum(relation in entity.facts for entity in entities)
        if draft.kind != PRONOUN:
            return WorldQuestion(draft.kind, draft.text, draft.answer, tuple(gold), floor)
        facts = {entity.name: entity.facts for entity in entities}
        say = [
            facts[told[i].entity][relation]
            for i, to in joined.items()
            if to == naming and relation in told[i].relations
        ]
        return WorldQuestion(
            draft.kind, draft.text, draft.answer, (naming, *gold), floor, say[0] if len(say) == 1 else ""
        )


def _states(segment: WorldSegment, asked: Asked) -> bool:
    return segment.entity == asked[0] and asked[1] in segment.relations


def _joined(told: Sequence[WorldSegment], edges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Segment -> the naming segment of its document, as far as edges in either direction tell. Segments that name their
    entity themselves are included."""
    found = {i: i for i, segment in enumerate(told) if segment.named}
    for one, other in edges:
        if told[one].named != told[other].named:
            later, naming = (one, other) if told[other].named else (other, one)
            found[later] = naming
    return found


def _sorted_by(told: Sequence[WorldSegment], joined: Mapping[int, int]) -> list[int]:
    """The order in which every naming segment is followed by those joined to it. Segments joined to none come last."""
    order = [i for naming in range(len(told)) if told[naming].named for i in _document(naming, joined)]
    return order + [i for i in range(len(told)) if i not in joined]


def _document(naming: int, joined: Mapping[int, int]) -> list[int]:
    return [naming, *sorted(i for i, to in joined.items() if to == naming and i != naming)]


def _next_of_kind(rng: random.Random, told: Sequence[WorldSegment]) -> dict[int, int]:
    """Naming segment -> that of another entity of its kind: all shifted by one random number."""
    others: dict[int, int] = {}
    for kind in AGAIN:
        naming = [i for i, segment in enumerate(told) if segment.named and segment.kind == kind]
        if naming:
            step = rng.randrange(1, len(naming))
            others |= {one: naming[(k + step) % len(naming)] for k, one in enumerate(naming)}
    return others


# -- settings ---------------------------------------------------------------------------------------------------------


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise WorldError(f"{name} is {str(value)[:40]!r}; there are {', '.join(known)}")


def _parsed(name: str, value: str) -> Any:
    """A setting's value from its text."""
    try:
        if name == "entities":
            few, _, many = value.partition("-")
            return int(few), int(many or few)
        if name == "types":
            return tuple(value.split("+"))
        if name in ("seed", "count", "questions", "statements"):
            return int(value)
        return float(value) if name == "share" else value
    except ValueError:
        raise WorldError(f"{name} is {value[:40]!r}, which isn't a number") from None
