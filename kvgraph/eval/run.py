"""One run: a task's items, by one method, on one model, through the real engine. It can be resumed at any moment.

A run is a folder: `config.json` (written first), `results.jsonl` (a line an item, as they finish) and, once every item
has its line, `summary.json`. docs/reference/evaluation.md says what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kvgraph
from kvgraph import methods
from kvgraph.data import io, prompt
from kvgraph.data.items import Data
from kvgraph.data.task import Item, Task, TaskError
from kvgraph.engine.engine import Engine
from kvgraph.engine.request import Request
from kvgraph.engine.result import Result, Usage
from kvgraph.engine.sampling import SamplingParams
from kvgraph.errors import KVGraphError
from kvgraph.eval import stats
from kvgraph.eval.metrics import EXTRACT, METRICS, SETS
from kvgraph.eval.runs import FORMAT, RESULTS, SUMMARY, RunError, changes, unknown
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method
from kvgraph.plan import Plan
from kvgraph.progress import Progress
from kvgraph.store.codecs.registry import spec_of

CONFIG = "config.json"
WINDOW = 32  # requests in the engine at once
MAY_CHANGE = ("data.from", "model.name")  # locations; the contents are hashed

Summary = dict[str, Any]
"""What summary.json holds."""


def evaluate(
    engine: Engine,
    task: Task,
    method: str | Method,
    items: Sequence[Item],
    out: str | Path,
    *,
    data: Data | None = None,
    edges: str | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    ablation: str | None = None,
    window: int = WINDOW,
    progress: bool | None = None,
) -> Summary:
    """Answer and score every item, and write the run to folder `out`. Items that are there already aren't run again.

    method: a spec as `kvgraph.methods.parse` reads it, or an instance.
    data: where the items come from, for the summary.
    edges: for methods that read them (default: the task's).
    max_tokens: maximum per answer (default: the task's).
    seed: of the intervals.
    ablation: what was changed, if this is a variant.
    window: requests in the engine at once.
    progress: show a bar (default: on a terminal).

    An item that can't be run (longer than the model's limit, larger than the KV budget, refused by the method) gets a
    line with an "error", scores 0, and is counted in the summary; the run continues. After an interruption or a kill,
    the same call resumes. It runs items with an error again, also those of a finished run. Raises RunError if `out`
    holds another run or can't be written, and GraphError for an unknown method or unknown edges.
    """
    params = SamplingParams(max_tokens=task.max_tokens if max_tokens is None else max_tokens, stop=task.stop)
    spec = method if isinstance(method, str) else methods.format(method)
    method = methods.resolve(method)
    edges = (task.edges if edges is None else edges) if method.reads_edges else "none"
    _check(engine, task, items, edges)
    config = _config(engine, task, spec, method, params, items, data, edges, seed, ablation)
    folder = Path(out)
    with io.errors_named(folder, RunError), io.locked(folder, RunError):
        _begin(folder, config)
        with closing(_Results(folder / RESULTS, items)) as results:
            if results.complete and (folder / SUMMARY).is_file():
                return _loaded(folder / SUMMARY)
            (folder / SUMMARY).unlink(missing_ok=True)  # before lines that it counts are dropped
            results.drop_errors()
            session = _Session(datetime.now(UTC), time.perf_counter(), len(results.lines))
            todo = [item for item in items if item.id not in results.lines]
            label, headline = f"{task.name} {spec}", task.metrics[0]
            total = sum(line["scores"][headline] for line in results.lines.values())
            with (
                closing(_answers(engine, task, method, todo, edges, params, window)) as answers,
                Progress(label, len(items), enabled=progress) as bar,
            ):
                bar.advance(len(results.lines))
                for asked, answer in answers:
                    line = _line(task, asked, answer)
                    results.append(line)
                    total += line["scores"][headline]
                    bar.advance(1, label=f"{label}  {headline} {total / len(results.lines):.3f}")
            lines = results.finish()
        summary = config | _scores(task, lines, seed) | _costs(engine, lines, session)
        io.write_json(folder / SUMMARY, summary)
        return summary


def slug(spec: str) -> str:
    """A folder name for a method's spec: "graph-kv:rounds=2" -> "graph-kv_rounds=2". Other specs get other names."""
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "-", re.sub(r"\s", "", spec).replace(":", "_", 1))[:100]
    plain = re.fullmatch(r"[A-Za-z0-9.,=+-]+(:[A-Za-z0-9._=,+-]*)?", spec)
    return name if plain and len(spec) <= 100 else f"{name}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"


def _check(engine: Engine, task: Task, items: Sequence[Item], edges: str) -> None:
    """Raise the errors that would otherwise occur for every item."""
    if engine.model.tokenizer is None:
        raise RunError(f"{engine.model.name} has no tokenizer, but tasks are text; give a model with one")
    unknown = [name for name in task.metrics if name not in METRICS] + [task.extract] * (task.extract not in EXTRACT)
    if unknown:
        raise TaskError(f"task {task.name} names {unknown[0]!r}, which isn't in kvgraph.eval.metrics")
    if not items:
        raise TaskError(f"there are no items of {task.name} to evaluate")
    repeated = [id_ for id_, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise TaskError(f"several items have the id {repeated[0]!r}; ids must be unique")
    if edges != prompt.LINKS:
        largest = max(items, key=lambda item: len(item.documents))
        ContextGraph([""] * len(largest.documents), edges=prompt.edges_of(largest, edges))


# -- asking -----------------------------------------------------------------------------------------------------------


class _Entered(NamedTuple):
    """An item in the engine."""

    item: Item
    graph: ContextGraph
    plan_tokens: int


def _answers(
    engine: Engine,
    task: Task,
    method: Method,
    items: Iterable[Item],
    edges: str,
    params: SamplingParams,
    window: int,
) -> Generator[tuple[_Entered, Result | KVGraphError]]:
    """Answers as they finish. A new item enters as soon as fewer than `window` are in the engine."""
    entered: dict[int, _Entered] = {}  # by number, until their answer

    def requests() -> Iterator[Request | KVGraphError]:
        for i, item in enumerate(items):
            asked = entered[i] = _Entered(item, ContextGraph([]), 0)
            try:
                graph = prompt.build(task, item, engine.model.tokenizer).graph(prompt.edges_of(item, edges))
                asked = entered[i] = asked._replace(graph=graph)
                plan = engine.plan(graph, method)
                entered[i] = asked._replace(plan_tokens=_tokens(plan))
                yield engine.prepare(plan, params)
            except KVGraphError as error:
                yield error

    with closing(engine.run(requests(), in_flight=window)) as outcomes:
        for i, outcome in outcomes:
            yield entered.pop(i), outcome


def _tokens(plan: Plan) -> int:
    return sum(len(span) for span in plan.spans)


def _line(task: Task, asked: _Entered, answer: Result | KVGraphError) -> dict[str, Any]:
    """An item's line in results.jsonl."""
    item = asked.item
    failed = isinstance(answer, KVGraphError)
    result = Result("", [], "error", Usage()) if isinstance(answer, KVGraphError) else answer
    usage, extracted = result.usage, EXTRACT[task.extract](result.text)
    return {
        "id": item.id,
        "kind": item.kind,
        "facts": dict(item.facts),
        "cluster": _cluster(item),
        "documents": [document.id or document.title for document in item.documents],
        "edges": [list(edge) for edge in asked.graph.edges],
        "prediction": result.text,
        "extracted": extracted,
        "golds": list(item.references),
        "scores": {name: 0.0 if failed else METRICS[name](extracted, item.references) for name in task.metrics},
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "plan_tokens": asked.plan_tokens,
            "live_tokens": usage.live_tokens,
            "probe_tokens": usage.probe_tokens,
            "completion_tokens": usage.completion_tokens,
            "kv_bytes": usage.kv_bytes,
        },
        "finish_reason": result.finish_reason,
        **({"error": " ".join(str(answer).split())} if failed else {}),
        "timing": {
            "queued": usage.queued,
            "probe": usage.probe,
            "ttft": usage.ttft,
            "decode": usage.decode,
            "computed_tokens": usage.computed_tokens,
            "document_tokens_computed": usage.document_tokens_computed,
            "reused_tokens": usage.reused_tokens,
        },
    }


def _cluster(item: Item) -> str:
    """The item's cluster as the task gives it; otherwise the texts that the item reads, in any order."""
    if item.cluster or not item.documents:
        return item.cluster or item.id
    texts = sorted((document.title, document.text) for document in item.documents)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


# -- the folder -------------------------------------------------------------------------------------------------------


class _Results:
    """results.jsonl: read, appended to, and sorted at the end. An incomplete last line, left by a kill, is removed."""

    def __init__(self, path: Path, items: Sequence[Item]):
        self.path, self.items = path, items
        self.file = open(path, "ab", buffering=0)
        self.lines: dict[str, dict[str, Any]] = {}
        known = {item.id for item in items}
        for number, raw in enumerate(io.whole_lines(path), 1):
            line = self._parsed(raw, number)
            if line["id"] not in known or line["id"] in self.lines:
                why = "a second line for item" if line["id"] in self.lines else "a line for the unknown item"
                raise RunError(f"{path}:{number} is {why} {line['id']!r}; delete that line, or give another folder")
            self.lines[line["id"]] = line

    def _parsed(self, raw: bytes, number: int) -> dict[str, Any]:
        try:
            line = json.loads(raw)
            hash(line["id"]), line["scores"].keys(), line["timing"].keys()
            return line
        except (ValueError, TypeError, LookupError, AttributeError):
            raise RunError(f"{self.path}:{number} is damaged; delete that line to run its item again") from None

    @property
    def complete(self) -> bool:
        """Whether every item has its answer."""
        return len(self.lines) == len(self.items) and not any("error" in line for line in self.lines.values())

    def drop_errors(self) -> None:
        """Forget items that failed: what made them fail, such as too little memory, may have changed."""
        answered = {id_: line for id_, line in self.lines.items() if "error" not in line}
        if len(answered) < len(self.lines):
            io.write(self.path, b"".join(map(io.line, answered.values())))
            self.file.close()
            self.file, self.lines = open(self.path, "ab", buffering=0), answered

    def append(self, line: dict[str, Any]) -> None:
        """Add a finished item's line. After an error (a full disk) the file is as before."""
        io.append(self.file, io.line(line))
        self.lines[line["id"]] = line

    def finish(self) -> list[dict[str, Any]]:
        """All lines in the items' order; the file is sorted as well."""
        ordered = [self.lines[item.id] for item in self.items]
        os.fsync(self.file.fileno())
        if list(self.lines) != [item.id for item in self.items]:
            io.write(self.path, b"".join(map(io.line, ordered)))
        return ordered

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _begin(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a new run, or check that the run that began here has the same."""
    path = folder / CONFIG
    if not path.is_file():
        if any((folder / name).exists() for name in (RESULTS, SUMMARY)):
            raise RunError(f"{folder} has results but no {CONFIG} that says what they are; give another folder")
        io.write_json(path, config)
        return
    for field, before, now in changes(_loaded(path), config):
        if field not in MAY_CHANGE and not unknown(field, before, now):
            before, now = (json.dumps(value, ensure_ascii=False)[:80] for value in (before, now))
            raise RunError(
                f"{folder} holds a run with {field} = {before}, not {now}; give another folder, or delete it"
            )


def _loaded(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise RunError(f"{path} is damaged; delete it if it is a {SUMMARY}, otherwise give another folder") from None


# -- the summary ------------------------------------------------------------------------------------------------------


def _config(
    engine: Engine,
    task: Task,
    spec: str,
    method: Method,
    params: SamplingParams,
    items: Sequence[Item],
    data: Data | None,
    edges: str,
    seed: int,
    ablation: str | None,
) -> dict[str, Any]:
    """What identifies the run: the part of the summary that is known before it starts."""
    digest = _digest(items)
    data = data or Data(tuple(items), sha256=digest)
    model = engine.model
    template = getattr(model.tokenizer, "chat_template", None)
    config = {
        "format": FORMAT,
        "task": task.name,
        "headline": task.metrics[0],
        "metrics": task.metrics,
        "method": {"spec": spec, "name": method.name, "fields": methods.configuration(method)},
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": len(model.layers),
        },
        "seed": seed,
        "limit": data.limit,
        "data": {"from": data.source, "sha256": data.sha256, "shuffled": data.shuffled, "items": len(data.items)},
        "items_sha256": digest,
        "prompt": {
            "instruction": task.instruction,
            "question": task.question,
            "document": task.document,
            "chat_template": bool(template),
            "chat_template_sha256": hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None,
        },
        "decode": asdict(params),
        "extract": task.extract,
        "edges": edges if edges != "none" else None,
        "ablation": ablation,
    }
    if not engine.codec.lossless:
        config["codec"] = spec_of(engine.codec)
    return json.loads(json.dumps(config))  # as it is read back: lists instead of tuples


def _digest(items: Sequence[Item]) -> str:
    """A hash of the items. It names their references as format 1 does, so that older runs resume."""
    fields = [{"golds" if k == "references" else k: v for k, v in asdict(item).items()} for item in items]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _scores(task: Task, lines: Sequence[Mapping[str, Any]], seed: int) -> Summary:
    """Every metric over all items and by every breakdown, scores of the whole set, and counts: all from the answers."""
    groups = {name: _groups(lines, name) for name in task.breakdowns}
    return {
        "scores": _means(task, lines, seed),
        "by": {
            name: {str(value): _means(task, part, seed) for value, part in found.items()}
            for name, found in groups.items()
            if found
        },
        "sets": {
            name: {
                "overall": score(line["scores"][metric] for line in lines)._asdict(),
                "by_kind": {
                    kind: score(line["scores"][metric] for line in part)._asdict()
                    for kind, part in _groups(lines, "kind").items()
                },
            }
            for metric, (name, score) in SETS.items()
            if metric in task.metrics
        },
        "errors": sum("error" in line for line in lines),
        "finish": dict(sorted(Counter(line["finish_reason"] for line in lines).items())),
        "tokens": {
            short: sum(line["usage"][f"{short}_tokens"] for line in lines)
            for short in ("prompt", "plan", "live", "probe", "completion")
        },
    }


def _means(task: Task, lines: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, float]]:
    clusters = stats.clusters_of(lines)
    return {
        metric: stats.mean_interval([line["scores"][metric] for line in lines], clusters, seed=seed)._asdict()
        for metric in task.metrics
    }


def _groups(lines: Sequence[Mapping[str, Any]], name: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Lines by their kind or a fact, in order of its values. Lines without it are left out."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for line in lines:
        value = line["kind"] or None if name == "kind" else line["facts"].get(name)
        if value is not None:
            groups.setdefault(value, []).append(line)
    return dict(sorted(groups.items(), key=lambda group: (isinstance(group[0], str), group[0])))


class _Session(NamedTuple):
    """This call's share of a run."""

    started: datetime
    clock: float
    done_before: int


def _costs(engine: Engine, lines: Sequence[Mapping[str, Any]], session: _Session) -> Summary:
    """What may differ from run to run: times, what had to be computed, and the environment."""
    timings = [line["timing"] for line in lines if "error" not in line]
    reused: Counter[str] = Counter()
    for timing in timings:
        reused.update(timing["reused_tokens"])
    seconds, count = time.perf_counter() - session.clock, len(lines) - session.done_before
    return {
        "timing": {
            "seconds": seconds,
            "items": count,
            "items_per_second": count / seconds,
            **{name: _median(timing[name] for timing in timings) for name in ("queued", "ttft", "decode")},
            "tokens": {
                "computed": sum(timing["computed_tokens"] for timing in timings),
                "documents_computed": sum(timing["document_tokens_computed"] for timing in timings),
                "reused": dict(sorted(reused.items())),
            },
        },
        "environment": {
            "versions": {
                "kvgraph": kvgraph.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "numpy", "scipy")},
            },
            "git_commit": _git_commit(),
            "machine": _machine(engine.model.device),
            "threads": torch.get_num_threads(),
            "kv_budget": engine.scheduler.memory.budget,
            "max_step_tokens": engine.scheduler.max_step_tokens,
            "store": engine.store is not None,
            "started": session.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _machine(device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{platform.system()} {platform.machine()}, {where}"


def _git_commit() -> str | None:
    """The commit of this checkout, with "+" when files differ from it; None for an installed package."""
    root = Path(kvgraph.__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
