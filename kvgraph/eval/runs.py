"""Finished runs on disk, as `kvgraph.eval.run` writes them: reading them and comparing them item by item."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvgraph.errors import KVGraphError
from kvgraph.eval import stats
from kvgraph.eval.stats import Difference, Interval

FORMAT = 1
SUMMARY, RESULTS = "summary.json", "results.jsonl"
NEEDED = ("task", "headline", "method", "model", "scores", "by", "tokens", "timing", "environment")
# Settings that must be equal for a difference between two runs to be a difference between their methods.
MUST_MATCH = ("prompt", "decode", "extract", "data.sha256", "model.fingerprint", "model.dtype")
TEMPLATE = "prompt.chat_template_sha256"  # which runs of older versions don't have


class RunError(KVGraphError, ValueError):
    """A folder holds no finished run, or one that can't be read. The message names the file."""


@dataclass(frozen=True)
class Run:
    """One finished run: its folder, summary.json, and the lines of results.jsonl in item order."""

    folder: Path
    summary: Mapping[str, Any]
    results: tuple[Mapping[str, Any], ...]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """The run in `folder`. Raises RunError if it isn't finished, is damaged, or has an unknown format."""
        if not (folder / SUMMARY).is_file():
            raise RunError(f"{folder}: there is no finished run here ({SUMMARY} is missing)")
        summary = _json(folder / SUMMARY, (folder / SUMMARY).read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or summary.get("format") != FORMAT:
            raise RunError(f"{folder / SUMMARY} isn't the summary of an evaluation in format {FORMAT}")
        if not (folder / RESULTS).is_file():
            raise RunError(f"{folder}: {RESULTS} is missing beside {SUMMARY}; run the evaluation again")
        lines = (folder / RESULTS).read_text(encoding="utf-8").split("\n")
        results = tuple(_json(f"{folder / RESULTS}:{i}", line) for i, line in enumerate(lines, 1) if line)
        missing = [key for key in NEEDED if key not in summary]
        if missing:
            raise RunError(f"{folder / SUMMARY} has no {missing[0]!r}; run the evaluation again")
        if not results:
            raise RunError(f"{folder / RESULTS} holds no items; run the evaluation again")
        if any(not isinstance(r, dict) or "id" not in r or "scores" not in r for r in results):
            raise RunError(f"{folder / RESULTS} has lines that aren't results of an evaluation; run it again")
        return cls(folder, summary, results)

    @property
    def task(self) -> str:
        """The task's name."""
        return self.summary["task"]

    @property
    def method(self) -> str:
        """The method as it was given, a spec such as "graph-kv:rounds=2", and the codec if that changes answers."""
        return ", ".join(filter(None, (self.summary["method"]["spec"], self.summary.get("codec"))))

    @property
    def model(self) -> str:
        """The model's name, without its folders."""
        return Path(str(self.summary["model"]["name"])).name

    @property
    def ablation(self) -> str | None:
        """Which variant of an ablation this is; None for an ordinary run."""
        return self.summary.get("ablation")

    @property
    def headline(self) -> str:
        """The headline metric's name."""
        return self.summary["headline"]

    @property
    def score(self) -> Interval:
        """The headline metric's mean with its interval."""
        return self.interval(self.headline)

    def interval(self, metric: str) -> Interval:
        """A metric's mean with its interval."""
        return interval(self.summary["scores"][metric])

    @property
    def errors(self) -> int:
        """Items that couldn't be run; they count as 0."""
        return self.summary.get("errors", 0)

    @cached_property
    def by_id(self) -> Mapping[str, Mapping[str, Any]]:
        """Results by the item's id."""
        return {result["id"]: result for result in self.results}


def find(folders: Iterable[Path]) -> Iterator[Run]:
    """Every finished run in these folders and below, by path. Raises RunError if a folder holds none."""
    seen: set[Path] = set()
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob(SUMMARY)) if folder.is_dir() else []
        if not found:
            raise RunError(f"{folder}: there is no finished run in or below this folder ({SUMMARY} is missing)")
        for path in found:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield Run.load(path)


def interval(stored: Mapping[str, Any]) -> Interval:
    """The interval that a summary stores as {"mean", "low", "high", "n"}."""
    return Interval(*(stored[field] for field in Interval._fields))


def compared(a: Run, b: Run, metric: str | None = None, seed: int = 0) -> Difference | None:
    """How b's scores differ from a's on the items that both have; None if they share no item or lack the metric."""
    metric = metric or a.headline
    shared = [r for r in a.results if r["id"] in b.by_id]
    pairs = [(r["scores"].get(metric), b.by_id[r["id"]]["scores"].get(metric)) for r in shared]
    kept = [i for i, pair in enumerate(pairs) if None not in pair]
    if not kept:
        return None
    clusters = stats.clusters_of([shared[i] for i in kept])
    return stats.paired([pairs[i][0] for i in kept], [pairs[i][1] for i in kept], clusters, seed=seed)


def mismatches(a: Run, b: Run) -> list[str]:
    """Why a difference between two runs may not be one between their methods: a phrase for each reason."""
    found = [
        f"{path}: {shown(before)} against {shown(after)}"
        for path, before, after in changes(a.summary, b.summary)
        if any(path == name or path.startswith(f"{name}.") for name in MUST_MATCH) and not unknown(path, before, after)
    ]
    if set(a.by_id) != set(b.by_id):
        shared = len(set(a.by_id) & set(b.by_id))
        found.append(f"items: {shared:,} in common of {len(a.by_id):,} and {len(b.by_id):,}")
    return found


def unknown(path: str, before: Any, after: Any) -> bool:
    """Whether a field differs only because a run of an older version doesn't say it."""
    return path == TEMPLATE and None in (before, after)


def changes(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, a's value, b's value) of every leaf that differs between two JSON values; None if missing."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            yield from changes(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    elif a != b:
        yield path, a, b


def shown(value: Any, most: int = 60) -> str:
    """A JSON value on one short line, for people."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[:most] + "…"


def _json(where: Path | str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RunError(f"{where} isn't valid JSON ({error}); run the evaluation again to complete it") from None
