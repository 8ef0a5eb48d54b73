"""Two runs side by side: which settings and scores differ, and whether by more than noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvgraph.eval import runs, stats
from kvgraph.eval.runs import Run, RunError
from kvgraph.eval.stats import Difference

OUTCOME = {"scores", "by", "sets", "errors", "finish", "tokens", "timing"}  # of a summary; the rest are settings
UNIMPORTANT = {"environment.started", "environment.finished"}


class ComparisonRow(NamedTuple):
    """One score of both runs on the items they share, and the paired test."""

    name: str
    a: float
    b: float
    difference: Difference


class Flip(NamedTuple):
    """An item whose headline score differs: its lines in both results files."""

    id: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    metric: str

    def cells(self) -> tuple[str, ...]:
        """Texts for a line of a table."""
        values = [f"{100 * line['scores'][self.metric]:.0f}" for line in (self.a, self.b)]
        references = " / ".join(self.a.get("golds", ()))
        answers = [line.get("error") or line.get("extracted", "") for line in (self.a, self.b)]
        return self.id[:40], *values, *(" ".join(text.split())[:60] for text in (references, *answers))


@dataclass(frozen=True)
class Comparison:
    """What differs between runs a and b.

    settings: (path, a's, b's).
    rows: the headline first, then other metrics and breakdowns.
    flips: items whose headline score differs, in item order.
    costs: (name, a's, b's).
    """

    a: Run
    b: Run
    settings: tuple[tuple[str, Any, Any], ...]
    rows: tuple[ComparisonRow, ...]
    flips: tuple[Flip, ...]
    costs: tuple[tuple[str, str, str], ...]
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """A sentence that says whether the headline's difference is more than noise."""
        row = self.rows[0]
        d, p = row.difference, stats.p_text(row.difference.p)
        where = f"on {d.n:,} items"
        if d.is_real:
            word = "better" if d.difference > 0 else "worse"
            return f"B is {word} than A in {row.name} {where}: {d} points, p = {p}; this is more than noise."
        return f"No difference beyond noise in {row.name} {where}: {d} points, p = {p}."

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "format": 1,
            "a": str(self.a.folder),
            "b": str(self.b.folder),
            "settings": [{"name": name, "a": a, "b": b} for name, a, b in self.settings],
            "scores": [{"name": r.name, "a": r.a, "b": r.b, **r.difference._asdict()} for r in self.rows],
            "flips": [{"id": flip.id, "a": flip.a, "b": flip.b} for flip in self.flips],
            "warnings": list(self.warnings),
            "more_than_noise": self.rows[0].difference.is_real,
            "verdict": self.verdict,
        }


def compare(a: Path, b: Path) -> Comparison:
    """Compare the runs in folders a and b. Raises RunError if one isn't finished, or they share no item or metric."""
    left, right = Run.load(a), Run.load(b)
    rows = tuple(_rows(left, right))
    if left.task != right.task or not rows or rows[0].name != left.headline:
        raise RunError(
            f"{a} (task {left.task}, {left.headline}) and {b} (task {right.task}, {right.headline}) have no items or "
            f"no metric in common; compare runs of the same task"
        )
    settings = tuple(
        change
        for change in runs.changes(left.summary, right.summary)
        if change[0].split(".")[0] not in OUTCOME and change[0] not in UNIMPORTANT and not runs.unknown(*change)
    )
    flips = tuple(
        Flip(result["id"], result, other, left.headline)
        for result in left.results
        if (other := right.by_id.get(result["id"]))
        and result["scores"][left.headline] != other["scores"].get(left.headline)
    )
    warnings = [f"more than the method differs: {phrase}" for phrase in runs.mismatches(left, right)]
    return Comparison(left, right, settings, rows, flips, tuple(_costs(left, right)), tuple(warnings))


def _rows(a: Run, b: Run) -> Iterator[ComparisonRow]:
    for metric in dict.fromkeys([a.headline, *a.summary["scores"]]):
        yield from _row(metric, a, b, metric)
    for name, values in a.summary["by"].items():
        for value in values if len(values) > 1 else ():
            yield from _row(f"{a.headline}, {name.replace('_', ' ')} {value}", a, b, a.headline, (name, value))


def _row(name: str, a: Run, b: Run, metric: str, only: tuple[str, str] | None = None) -> Iterator[ComparisonRow]:
    """The row of a metric over the shared items, or those whose kind or fact has this value; None without items."""
    scores = [
        (result["scores"][metric], b.by_id[result["id"]]["scores"][metric], result)
        for result in a.results
        if (only is None or _value(result, only[0]) == only[1])
        and metric in result["scores"]
        and metric in b.by_id.get(result["id"], {"scores": ()})["scores"]
    ]
    if scores:
        first, second, results = zip(*scores, strict=True)
        difference = stats.paired(first, second, stats.clusters_of(results))
        yield ComparisonRow(name, sum(first) / len(first), sum(second) / len(second), difference)


def _value(result: Mapping[str, Any], breakdown: str) -> str:
    return str(result.get("kind", "") if breakdown == "kind" else result.get("facts", {}).get(breakdown))


def _costs(a: Run, b: Run) -> Iterator[tuple[str, str, str]]:
    before, after = a.summary["timing"], b.summary["timing"]
    probes = [run.summary["tokens"]["probe"] for run in (a, b)]
    for name, key in (("tokens computed", "computed"), ("tokens of documents computed", "documents_computed")):
        yield name, f"{before['tokens'][key]:,}", f"{after['tokens'][key]:,}"
    if any(probes):
        yield "tokens probed, through one layer", f"{probes[0]:,}", f"{probes[1]:,}"
    if None not in (before["ttft"], after["ttft"]):
        yield "median time to first token", f"{1000 * before['ttft']:,.1f} ms", f"{1000 * after['ttft']:,.1f} ms"
