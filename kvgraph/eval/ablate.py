"""Ablations: the same run with one thing changed, and what that does to the score.

An ablation is a function from a base variant to others that differ from it in one named thing. Each variant is an
ordinary run in a folder of its own, compared with the base item by item.

A named shape of edges ("top-k:2", "chain") refers to ranks. When documents are reordered, it applies to the new order.
An item's own links refer to documents and follow them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvgraph.data import io
from kvgraph.data.prompt import LINKS, edges_of
from kvgraph.data.task import Item, Task
from kvgraph.errors import GraphError
from kvgraph.eval import runs, stats
from kvgraph.eval.stats import Difference
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method

if TYPE_CHECKING:
    from kvgraph.engine.engine import Engine

BASE = "base"
DISTRACTORS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Variant:
    """The arguments of one run of an ablation. edges: a shape for `named_edges`, or "links" for the items' own."""

    name: str
    about: str
    method: Method
    items: Sequence[Item] = field(repr=False)
    edges: str


Ablation = Callable[[Variant, int], Iterable[Variant]]  # (base, seed) -> variants


def mask_and_positions(base: Variant, seed: int) -> Iterator[Variant]:
    """Who reads whom, and shared positions: each alone, and neither."""
    return _of_method(base, "mask-positions")


def random_edges(base: Variant, seed: int) -> Iterator[Variant]:
    """The same graph with the documents at random nodes: as many edges, readers and rounds, but other neighbours.

    Drawn for every item from the seed and the item's id; it differs from the item's own graph if it can.
    """
    if base.method.reads_edges:
        items = [replace(item, links=_relabelled(item, base.edges, seed)) for item in base.items]
        about = "as many edges, between random documents"
        yield replace(base, name="random-edges", about=about, items=items, edges=LINKS)


def reversed_edges(base: Variant, seed: int) -> Iterator[Variant]:
    """Every edge reversed: sources read their readers."""
    if base.method.reads_edges:
        items = [replace(item, links=tuple((r, s) for s, r in indexed_edges(item, base.edges))) for item in base.items]
        yield replace(base, name="reversed-edges", about="every edge reversed", items=items, edges=LINKS)


def rounds(base: Variant, seed: int) -> Iterator[Variant]:
    """How often caches travel along the edges: 0, 1, 2 and 3 rounds."""
    return _of_method(base, "rounds")


def keep(base: Variant, seed: int) -> Iterator[Variant]:
    """Whether the query still sees a reader's standalone version: dropped (`keep=read`) or kept (`keep=all`)."""
    return _of_method(base, "keep")


def _of_method(base: Variant, ablation: str) -> Iterator[Variant]:
    """The variations that the method itself declares."""
    for name, about, method, edges in base.method.variations().get(ablation, ()):
        yield replace(base, name=name, about=about, method=method, edges=base.edges if edges else "none")


def order(base: Variant, seed: int) -> Iterator[Variant]:
    """The documents in reverse order, and in random order (by the seed and the item's id)."""
    backwards = [_taking(item, range(len(item.documents) - 1, -1, -1)) for item in base.items]
    yield replace(base, name="order-reversed", about="documents in reverse order", items=backwards)
    shuffled = [_taking(item, _shuffled(len(item.documents), _rng(seed, item, "order"))) for item in base.items]
    yield replace(base, name="order-random", about="documents in random order", items=shuffled)


def distractors(base: Variant, seed: int) -> Iterator[Variant]:
    """Fewer distractors: a maximum number of documents besides the gold ones.

    Distractors are dropped from the end. If an item doesn't say which documents are gold, the first one counts as gold.
    """
    rest = "" if all(map(_knows_gold, base.items)) else ", or the first documents if gold isn't known"
    most = max((len(item.documents) - len(_gold(item)) for item in base.items), default=0)
    for n in DISTRACTORS:
        if n < most:
            items = [_taking(item, _without_distractors(item, n)) for item in base.items]
            about = f"at most {n} distractor{'s' * (n != 1)}{rest}"
            yield replace(base, name=f"distractors-{n}", about=about, items=items)


ABLATIONS: Mapping[str, Ablation] = MappingProxyType(
    {
        "mask-positions": mask_and_positions,
        "random-edges": random_edges,
        "reversed-edges": reversed_edges,
        "rounds": rounds,
        "keep": keep,
        "order": order,
        "distractors": distractors,
    }
)
"""Ablations by name. The docstrings say what they change."""


def parse(names: str) -> list[str]:
    """Names of ablations from "all" or "rounds,order". Raises GraphError, listing the known ones, for others."""
    if names.strip() == "all":
        return list(ABLATIONS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in ABLATIONS:
            raise GraphError(f"there is no ablation {name[:40]!r}; there are all, {', '.join(ABLATIONS)}")
    return list(dict.fromkeys(wanted))


def variants(base: Variant, names: Iterable[str], seed: int = 0) -> tuple[list[Variant], list[str]]:
    """(the variants of these ablations, a sentence for each one left out because it would change nothing)."""
    made: list[Variant] = []
    left_out: list[str] = []
    for name in names:
        found = list(ABLATIONS[name](base, seed))
        if not found:
            left_out.append(f"{name}: would change nothing for {base.method.name} on these items")
        for variant in found:
            twin = next((other for other in [base, *made] if _is_same(other, variant)), None)
            if twin is None:
                made.append(variant)
            else:
                left_out.append(f"{variant.name}: gives the same plans as {twin.name}")
    return made, left_out


@dataclass(frozen=True)
class AblationRow:
    """One variant's line: its run, and its difference to the base with Holm's correction over all lines."""

    run: runs.Run
    about: str
    difference: Difference | None = None  # None for the base
    p_corrected: float | None = None


@dataclass(frozen=True)
class Table:
    """An ablation's result, base first. left_out: what was not run, and why."""

    rows: tuple[AblationRow, ...]
    left_out: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The table as JSON values."""
        lines = []
        for row in self.rows:
            line: dict[str, Any] = {"variant": row.run.folder.name, "about": row.about, "metric": row.run.headline}
            line |= {"score": row.run.score._asdict()}
            if row.difference is not None:
                line |= {"difference": row.difference._asdict(), "p_corrected": row.p_corrected}
            lines.append(line)
        return {"rows": lines, "left_out": list(self.left_out)}

    def markdown(self) -> str:
        """The table as Markdown."""
        metric = self.rows[0].run.headline
        lines = [
            f"| variant | what changes | {metric} | difference to the base | p |",
            "|---|---|---|---|---|",
            *("| " + " | ".join(cells) + " |" for cells in self.cells()),
            "",
            f"Scores and differences in points with 95 % intervals, {self.rows[0].run.score.n:,} items; "
            "paired tests on the same items; p is after Holm's correction for all lines.",
            *(f"Left out: {sentence}." for sentence in self.left_out),
        ]
        return "\n".join(lines) + "\n"

    def cells(self) -> Iterator[tuple[str, str, str, str, str]]:
        """The texts of every line: variant, what changes, score, difference, p."""
        for row in self.rows:
            yield (
                row.run.folder.name,
                row.about,
                str(row.run.score),
                "" if row.difference is None else str(row.difference),
                "" if row.p_corrected is None else stats.p_text(row.p_corrected),
            )


def run(
    open_engine: Callable[[], Engine],
    task: Task,
    method: Method,
    items: Sequence[Item],
    names: Sequence[str],
    out: Path,
    *,
    edges: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Table:
    """Evaluate the base and every variant of the named ablations, each in out/<variant>; write out/table.md and .json.

    open_engine: makes an engine for each run, so that no run reuses what another left in memory.
    options: further arguments of `kvgraph.eval.run.evaluate`, the same for all runs.

    An interrupted ablation resumes.
    """
    from kvgraph.eval.run import evaluate

    spec = task.edges if edges is None else edges
    base = Variant(BASE, "", method, items, spec if method.reads_edges else "none")
    made, left_out = variants(base, names, seed)
    for variant in [base, *made]:
        with open_engine() as engine:
            evaluate(
                engine, task, variant.method, variant.items, out / variant.name,
                edges=variant.edges, seed=seed, ablation=None if variant is base else variant.name, **options,
            )  # fmt: skip
    table = compare([base, *made], out, left_out, seed)
    io.write(out / "table.md", table.markdown())
    io.write_json(out / "table.json", table.as_json())
    return table


def compare(ran: Sequence[Variant], out: Path, left_out: Iterable[str] = (), seed: int = 0) -> Table:
    """The table of finished runs in out/<variant>, with the base first."""
    base, *others = [runs.Run.load(out / variant.name) for variant in ran]
    found = [runs.compared(base, other, seed=seed) for other in others]
    corrected = stats.holm([difference.p for difference in found if difference])
    rows = [AblationRow(base, ran[0].about)]
    rows += map(AblationRow, others, (variant.about for variant in ran[1:]), found, corrected)
    return Table(tuple(rows), tuple(left_out))


def indexed_edges(item: Item, spec: str) -> tuple[tuple[int, int], ...]:
    """The item's edges under this spec (see `Variant.edges`), by index. Raises GraphError for unknown edges."""
    return ContextGraph([""] * len(item.documents), edges=edges_of(item, spec)).edges


def _rng(seed: int, item: Item, what: str) -> random.Random:
    return random.Random(f"{seed} {what} {item.id}")


def _shuffled(count: int, rng: random.Random) -> list[int]:
    return rng.sample(range(count), count)


def _relabelled(item: Item, spec: str, seed: int) -> tuple[tuple[int, int], ...]:
    """The item's edges after a random renaming of its documents; unchanged if no renaming tried changes them."""
    edges, rng = indexed_edges(item, spec), _rng(seed, item, "edges")
    for _ in range(20):
        name = _shuffled(len(item.documents), rng)
        drawn = tuple((name[s], name[r]) for s, r in edges)
        if set(drawn) != set(edges):
            return drawn
    return edges


def _knows_gold(item: Item) -> bool:
    return "gold_positions" in item.facts or "gold_position" in item.facts


def _gold(item: Item) -> list[int]:
    """The documents that hold the answer, by index; the first one if the item doesn't say."""
    stated = item.facts.get("gold_positions", item.facts.get("gold_position", 0))
    positions = [int(position) for position in str(stated).split(",") if position]
    return [i for i in positions if i < len(item.documents)]


def _without_distractors(item: Item, most: int) -> list[int]:
    """The item's documents by index, in order, without the distractors after the first `most`."""
    gold = set(_gold(item))
    extra = [i for i in range(len(item.documents)) if i not in gold]
    return sorted({*gold, *extra[:most]})


def _taking(item: Item, order: Iterable[int]) -> Item:
    """The item with only these documents, in this order. Its links and the facts about gold documents follow them."""
    kept = list(order)
    new = {old: i for i, old in enumerate(kept)}
    links = tuple((new[s], new[r]) for s, r in indexed_edges(item, LINKS) if s in new and r in new)
    gold = sorted(new[i] for i in _gold(item))
    facts = dict(item.facts)
    here = new.get(int(facts.get("gold_position", -1)), min(gold, default=0))
    now: dict[str, int | str] = {"gold_position": here, "gold_positions": ",".join(map(str, gold))}
    if facts.get("distractors") == len(item.documents) - len(gold):
        now["distractors"] = len(kept) - len(gold)
    elif len(kept) < len(item.documents):  # it counts groups of documents, which no longer holds
        facts.pop("distractors", None)
    facts = {name: now.get(name, value) for name, value in facts.items()}
    return replace(item, documents=tuple(item.documents[i] for i in kept), links=links, facts=facts)


def _is_same(one: Variant, other: Variant) -> bool:
    """Whether two variants give every item the same plan, whatever its documents' lengths."""
    pairs = list(zip(one.items, other.items, strict=True))
    if any(before.documents != after.documents for before, after in pairs):
        return False
    return all(_shape(one, before) == _shape(other, after) for before, after in pairs)


def _shape(variant: Variant, item: Item) -> Any:
    """A value that determines the plan of an item's documents, whatever their lengths."""
    documents = ContextGraph([""] * len(item.documents), edges=indexed_edges(item, variant.edges))
    return variant.method.outline(documents)
