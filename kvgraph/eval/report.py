"""Reports: finished runs as one page for people (self-contained HTML, Markdown) and as JSON for programs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from kvgraph.eval import plots, runs, stats
from kvgraph.eval.ablate import BASE
from kvgraph.eval.plots import Panel
from kvgraph.eval.runs import Run
from kvgraph.eval.stats import Difference, Interval

REFERENCE = "full"  # the method that others are compared with, if it was run
EXAMPLES = 4  # items shown per task
BINS = 10  # of a fact with too many values to draw each
MOST_VALUES = 12
CONFIGURATION = (
    "task", "method", "model", "metrics", "limit", "seed", "data", "prompt", "decode", "extract", "edges", "ablation",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of an item in a run: mean tokens, and the median time to first token in seconds since admission.

    Both include a probe (cacheblend): its time, and its tokens. A token probed through one of L layers counts as 1/L of
    a computed token. Items that couldn't be run don't count; ttft is None if none could.
    """

    computed: float
    reused: float
    ttft: float | None


@dataclass(frozen=True)
class Line:
    """A run in a table.

    difference: to the table's reference; None for the reference itself, or without a common item.
    p: the p-value of the difference, after Holm's correction for all lines of the table.
    """

    label: str
    run: Run
    cost: Cost
    difference: Difference | None = None
    p: float | None = None


@dataclass(frozen=True)
class Ablation:
    """The variants of one base run, which is in the first line."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class ShownItem:
    """One item with every method's answer: (label, prediction, score)."""

    item: Mapping[str, Any]
    answers: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Plot:
    """A plot as SVG text, and whether it takes the page's whole width."""

    caption: str
    svg: str
    wide: bool


@dataclass(frozen=True)
class Section:
    """One task on one model: ordinary runs in `lines`, the reference first, and ablations. best: a label, or None."""

    task: str
    model: str
    lines: tuple[Line, ...]
    ablations: tuple[Ablation, ...]
    best: str | None
    warnings: tuple[str, ...]

    @property
    def metric(self) -> str:
        """The task's headline metric."""
        return self.lines[0].run.headline

    @property
    def metrics(self) -> list[str]:
        """All metrics, the headline first."""
        return list(dict.fromkeys([self.metric, *(name for line in self.lines for name in line.run.summary["scores"])]))

    @property
    def caption(self) -> str:
        """The caption of the table of methods."""
        compared = (
            f"Differences in {self.metric} are to {self.lines[0].label}; p is after Holm's correction for all lines. "
        )
        probes = any(line.run.summary["tokens"]["probe"] for line in self.lines)
        counted = "A token probed through one of L layers counts as 1/L of a computed token. "
        first = "Time to first token is the median since admission, while other requests ran."
        return (compared if len(self.lines) > 1 else "") + (counted if probes else "") + first

    @cached_property
    def breakdowns(self) -> dict[str, dict[str, list[Interval | None]]]:
        """breakdown -> value -> the headline's interval for every line; None if a run has no such item."""
        found: dict[str, dict[str, list[Interval | None]]] = {}
        for i, line in enumerate(self.lines):
            for name, values in line.run.summary["by"].items():
                for value, metrics in values.items():
                    row = found.setdefault(name, {}).setdefault(value, [None] * len(self.lines))
                    row[i] = runs.interval(metrics[self.metric]) if self.metric in metrics else None
        return {name: values for name, values in found.items() if len(values) > 1}

    @cached_property
    def sets(self) -> dict[str, list[float | None]]:
        """Scores of the whole set, for every line."""
        found: dict[str, list[float | None]] = {}
        for i, line in enumerate(self.lines):
            for name, value in _numbers(line.run.summary.get("sets", {})):
                found.setdefault(name, [None] * len(self.lines))[i] = value
        return found

    @cached_property
    def plots(self) -> list[Plot]:
        """The headline by every numeric fact, and against the cost of an item."""
        made = []
        for fact in _numeric_facts(line.run for line in self._all_lines()):
            series = {line.label: _by_fact(fact, [line.run, *self._sharing(line, fact)]) for line in self.lines}
            name = fact.replace("_", " ")
            if len({x for points in series.values() for x, _ in points}) > 1:
                made.append(self._plot(f"by {name}", [Panel(name, series)]))
        panels = [
            self._against("tokens computed per item", "computed"),
            self._against("time to first token (ms)", "ttft"),
        ]
        return [*made, self._plot("against cost", panels)] if panels[0].series else made

    def _plot(self, what: str, panels: list[Panel]) -> Plot:
        caption = f"{self.task}: {self.metric} {what}"
        looks = plots.styles([line.label for line in self.lines])
        return Plot(caption, plots.svg(panels, f"{self.metric} (points)", looks, caption), plots.is_wide(panels))

    @cached_property
    def examples(self) -> list[ShownItem]:
        """The items on which the methods' scores differ most, in item order."""
        shared = set.intersection(*(set(line.run.by_id) for line in self.lines))
        first = [item for item in self.lines[0].run.results if item["id"] in shared]

        def spread(item: Mapping[str, Any]) -> float:
            scores = [line.run.by_id[item["id"]]["scores"].get(self.metric, 0.0) for line in self.lines]
            return max(scores) - min(scores)

        chosen = sorted(first, key=spread, reverse=True)[:EXAMPLES]
        return [ShownItem(item, tuple(self._answers(item["id"]))) for item in first if item in chosen]

    @cached_property
    def settings(self) -> list[tuple[str, dict[str, str]]]:
        """(label, settings and environment) of every run, ablations too."""
        named = [(line.label, line.run) for line in self.lines]
        named += [(f"{a.title}, {line.label}", line.run) for a in self.ablations for line in a.lines]
        return [(label, dict(_settings(run))) for label, run in named]

    @cached_property
    def same(self) -> dict[str, str]:
        """The settings that all its runs have in common."""
        return _common(settings for _, settings in self.settings)

    def own(self, known: Mapping[str, str]) -> dict[str, str]:
        """Further settings that its runs have in common."""
        return {name: value for name, value in self.same.items() if name not in known}

    @cached_property
    def varying(self) -> list[str]:
        """Names of the settings that differ between its runs."""
        return [name for name in dict.fromkeys(n for _, s in self.settings for n in s) if name not in self.same]

    def _answers(self, item: str) -> Iterator[tuple[str, str, float]]:
        for line in self.lines:
            result = line.run.by_id[item]
            answer = result.get("error") or result.get("prediction", "")
            yield line.label, answer, result["scores"].get(self.metric, 0.0)

    def _all_lines(self) -> Iterator[Line]:
        yield from self.lines
        for ablation in self.ablations:
            yield from ablation.lines[1:]

    def _sharing(self, line: Line, fact: str) -> list[Run]:
        """Variants of a base that are the same method with another value of the fact: those that drop distractors."""
        if fact != "distractors":
            return []
        groups = (ablation.lines for ablation in self.ablations if ablation.lines[0].run.method == line.run.method)
        return [v.run for lines in groups for v in lines[1:] if (v.run.ablation or "").startswith("distractors")]

    def _against(self, xlabel: str, cost: str) -> Panel:
        scale = 1000 if cost == "ttft" else 1
        series = {
            line.label: [(scale * getattr(line.cost, cost), line.run.score)]
            for line in self.lines
            if line.cost.ttft is not None
        }
        found = [x for [(x, _)] in series.values()]
        log = bool(found) and max(found) > 10 * min(found) > 0
        return Panel(xlabel + (", log scale" if log else ""), series, lines=False, log=log)


@dataclass(frozen=True)
class Report:
    """Everything a report shows."""

    sections: tuple[Section, ...]

    @property
    def lines(self) -> list[Line]:
        """Every run that isn't a variant of an ablation."""
        return [line for section in self.sections for line in section.lines]

    @property
    def warnings(self) -> list[str]:
        """Why some numbers can't be compared."""
        return [f"{section.task}: {warning}" for section in self.sections for warning in section.warnings]

    @property
    def models(self) -> set[str]:
        """The models' names."""
        return {section.model for section in self.sections}

    @property
    def labels(self) -> list[str]:
        """The overview's columns."""
        return list(dict.fromkeys(line.label for line in self.lines))

    @cached_property
    def same(self) -> dict[str, str]:
        """The settings that all runs have in common."""
        return _common(settings for section in self.sections for _, settings in section.settings)

    def html(self) -> str:
        """The page: self-contained, readable in light and dark mode and on paper."""
        return _template("report.html").render(report=self, css=_text("report.css"))

    def markdown(self) -> str:
        """The tables and examples, without the plots."""
        return _template("report.md").render(report=self)

    def as_json(self) -> dict[str, Any]:
        """Every run's scores and costs, every comparison, and the warnings, as JSON values."""
        return {
            "format": 1,
            "sections": [
                {
                    "task": section.task,
                    "model": section.model,
                    "metric": section.metric,
                    "reference": section.lines[0].label,
                    "best": section.best,
                    "runs": [_line_json(line) for line in section.lines],
                    "ablations": [
                        {"base": group.title, "runs": [_line_json(line) for line in group.lines]}
                        for group in section.ablations
                    ],
                }
                for section in self.sections
            ],
            "warnings": self.warnings,
        }


def build(folders: Iterable[Path]) -> Report:
    """The report of every finished run in these folders and below. Raises RunError if there is none."""
    found = list(runs.find(folders))
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in found:
        groups.setdefault((run.task, run.model), []).append(run)
    return Report(tuple(_section(task, model, members) for (task, model), members in groups.items()))


def _section(task: str, model: str, members: Sequence[Run]) -> Section:
    variants = sorted((run for run in members if run.ablation is not None), key=_by_name)
    plain = [run for run in members if run.ablation is None]
    bases = {run.folder.parent: run for run in plain if run.folder.name == BASE}
    # A base is the run that its variants are compared with. It also counts as one of the task's methods, unless that
    # method was run on its own too.
    alone = {run.method for run in plain if run not in bases.values()}
    ordinary = [run for run in plain if run.folder.parent not in bases or run.method not in alone]
    ordinary += [run for run in variants if run.folder.parent not in bases]
    ordinary.sort(key=lambda run: run.method != REFERENCE)
    lines = _lines(ordinary, _labels(ordinary))
    ablations = []
    for parent, group in groupby(variants, key=lambda run: run.folder.parent):
        if base := bases.get(parent):
            chosen = [base, *group]
            ablations.append(Ablation(base.method, _lines(chosen, [run.ablation or BASE for run in chosen])))
    warnings = [*_warnings(lines), *(w for ablation in ablations for w in _failed_variants(ablation))]
    return Section(task, model, lines, tuple(ablations), _best(lines), tuple(warnings))


def _by_name(run: Run) -> tuple[Path, list[Any]]:
    """A sort key that puts variants of a base next to each other and orders numbers in their names by value."""
    return run.folder.parent, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", run.folder.name)]


def _lines(members: Sequence[Run], labels: Sequence[str]) -> tuple[Line, ...]:
    """Lines of runs, each compared with the first."""
    reference = members[0]
    differences = [None, *(runs.compared(reference, run) for run in members[1:])]
    corrected = iter(stats.holm([d.p for d in differences if d is not None]))
    return tuple(
        Line(label, run, _cost(run), difference, None if difference is None else next(corrected))
        for label, run, difference in zip(labels, members, differences, strict=True)
    )


def _labels(members: Sequence[Run]) -> list[str]:
    """A name for each run of a task on a model: its method, with its folder if that isn't unique."""
    methods = [run.method + (f", {run.ablation}" if run.ablation else "") for run in members]
    return [
        method if methods.count(method) == 1 else f"{method} in {'/'.join(run.folder.parts[-3:])}"
        for method, run in zip(methods, members, strict=True)
    ]


def _best(lines: Sequence[Line]) -> str | None:
    """The run that is better than every other by more than noise, if there is one."""
    if len(lines) < 2:
        return None
    best = max(lines, key=lambda line: line.run.score.mean)
    differences = [runs.compared(line.run, best.run) for line in lines if line is not best]
    if any(d is None or d.difference <= 0 for d in differences):
        return None
    if any(runs.mismatches(line.run, best.run) for line in lines):
        return None
    return best.label if max(stats.holm([d.p for d in differences if d])) < stats.ALPHA else None


def _warnings(lines: Sequence[Line]) -> Iterator[str]:
    first = lines[0]
    for line in lines[1:]:
        if found := runs.mismatches(first.run, line.run):
            yield f"{line.label} can't be compared with {first.label} ({'; '.join(found)})"
    for line in lines:
        if line.run.errors:
            yield f"{line.label}: {line.run.errors:,} items couldn't be run and score 0"
    machines = {line.run.summary["environment"].get("machine") for line in lines}
    if len(machines) > 1:
        yield f"times were measured on {len(machines)} different machines"


def _failed_variants(ablation: Ablation) -> Iterator[str]:
    failed = [line.label for line in ablation.lines if line.run.errors]
    if failed:
        yield f"ablations of {ablation.title}: items couldn't be run and score 0 in {', '.join(failed)}"


def _cost(run: Run) -> Cost:
    ran = [result for result in run.results if "error" not in result]
    timings = [result["timing"] for result in ran]
    layers = run.summary["model"]["layers"]
    computed = [r["timing"]["computed_tokens"] + r["usage"]["probe_tokens"] / layers for r in ran]
    reused = [sum(timing["reused_tokens"].values()) for timing in timings]
    first = [timing["ttft"] - timing["queued"] + timing["probe"] for timing in timings]
    if not timings:
        return Cost(0.0, 0.0, None)
    return Cost(statistics.fmean(computed), statistics.fmean(reused), statistics.median(first))


def _numeric_facts(members: Iterable[Run]) -> list[str]:
    """Facts that are numbers in every item that has them, with more than one value."""
    values: dict[str, set[Any]] = {}
    for run in members:
        for result in run.results:
            for name, value in result.get("facts", {}).items():
                values.setdefault(name, set()).add(value)
    return [
        name
        for name, found in values.items()
        if len(found) > 1 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found)
    ]


def _by_fact(fact: str, members: Sequence[Run]) -> list[plots.Point]:
    """(value, interval of the headline) for the items of runs by a fact, in bins if it has many values."""
    results = [(r["facts"][fact], r) for run in members for r in run.results if fact in r.get("facts", {})]
    if not results:
        return []
    values = sorted({value for value, _ in results})
    width = (values[-1] - values[0]) / BINS if len(values) > MOST_VALUES else 0
    groups: dict[float, list[Mapping[str, Any]]] = {}
    for value, result in results:
        x = values[0] + (min(BINS - 1, (value - values[0]) // width) + 0.5) * width if width else value
        groups.setdefault(x, []).append(result)
    metric = members[0].headline
    return [
        (x, stats.mean_interval([r["scores"][metric] for r in group], stats.clusters_of(group)))
        for x, group in groups.items()
    ]


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of every number in nested mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path} · {key}" if path else str(key))
    elif isinstance(value, (int, float)):
        yield path, float(value)


def _settings(run: Run) -> Iterator[tuple[str, str]]:
    """A run's configuration and environment as (name, text), and its folder."""
    for part in (*CONFIGURATION, "environment"):
        value = run.summary.get(part)
        for key, inner in value.items() if isinstance(value, Mapping) else [("", value)]:
            name = f"{part}.{key}" if key and part != "environment" else key or part
            yield name, "–" if inner is None else inner if isinstance(inner, str) else runs.shown(inner, 300)
    yield "folder", str(run.folder)


def _common(several: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The entries that all mappings share."""
    first, *others = several
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _line_json(line: Line) -> dict[str, Any]:
    run = line.run
    found = {
        "label": line.label,
        "folder": str(run.folder),
        "method": run.summary["method"],
        "ablation": run.ablation,
        "scores": run.summary["scores"],
        "by": run.summary["by"],
        "sets": run.summary.get("sets", {}),
        "items": len(run.results),
        "errors": run.errors,
        "computed_tokens_per_item": line.cost.computed,
        "reused_tokens_per_item": line.cost.reused,
        "ttft_median": line.cost.ttft,
    }
    if line.difference is not None:
        found["difference"] = line.difference._asdict() | {"p_corrected": line.p}
    return found


def _text(name: str) -> str:
    return (files("kvgraph.eval") / "templates" / name).read_text(encoding="utf-8")


def _template(name: str) -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_text), undefined=StrictUndefined, autoescape=name.endswith(".html"),
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "p": stats.p_text,
        "cell": markdown_cell,
        "ms": _ms,
        "short": _short,
        "breakable": _breakable,
    }
    return environment.get_template(name)


def _breakable(text: str) -> Any:
    """Text for HTML that may break after a comma or a colon: a method's settings are one long word."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[,:])", text))


def markdown_cell(text: Any) -> str:
    """Text for a Markdown table cell: markup is escaped, and it stays on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~!&])", r"\\\1", " ".join(str(text).split()))


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _short(text: Any, most: int = 300) -> str:
    return str(text) if len(str(text)) <= most else f"{str(text)[:most]} …"
