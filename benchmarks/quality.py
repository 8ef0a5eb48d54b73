"""The quality cost of methods for a real model on real questions, without and with the adapter that ships with kvgraph.

    python -m benchmarks.quality SHARED_DATA --items 24 --rows quality.rows.jsonl --json benchmarks/results/quality.json

Each item is asked by every method. Recorded are the answer's negative log-likelihood (nats per token), whether the generated
answer contains a right one (substring EM), the tokens of the item's encoded documents, and, once these are encoded, the tokens
that a question computes and, for every fourth item, the time to its first token. All methods share one engine, which keeps the
KV of some items. The adapter wasn't trained on any of the questions: of the multi-hop training samples, only the twelfth that its data held out is used. An
interrupted run resumes (--rows).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from benchmarks.common import report
from kvgraph import Engine, SamplingParams, demo, methods, models
from kvgraph.data import prompt
from kvgraph.data.chat import Document
from kvgraph.data.items import read
from kvgraph.data.task import Item, Task
from kvgraph.data.tasks import get
from kvgraph.errors import GraphError, PlanError
from kvgraph.eval.metrics import substring_em
from kvgraph.eval.stats import mean_interval, p_text, paired
from kvgraph.graph import Edge
from kvgraph.models import adapters
from kvgraph.plan import Place, Plan
from kvgraph.progress import Progress
from runs.smollm2_data import asked, is_held_out, names, over_stories

NQ = "nq/nq-open-10_total_documents_gold_at_{}.jsonl.gz"
WAYS = {  # the name of a row: (method, edges)
    "full": ("full", ""),
    "block": ("block", ""),
    "kvlink": (demo.KVLINK, ""),
    "graph-kv all": ("graph-kv", "all"),
    "graph-kv top-3": ("graph-kv", "top-k:3"),
    "graph-kv links": ("graph-kv", "links"),
    "graph-kv random": ("graph-kv", "random"),
    "pcw": ("pcw", ""),
    "ape": ("ape", ""),
    "epic": ("epic", ""),
    "cacheblend": ("cacheblend", ""),
    "prompt-cache": ("prompt-cache", ""),
}
STATES = ("base", "tuned")
ANSWER_TOKENS = 24
KV = 1 << 30  # bytes, of some items: those of NQ have the same documents three times
TIMED = 4  # of so many items one is also asked for its first token alone, to time it


class Asked(NamedTuple):
    """An item of a set, and the task that says how it is asked."""

    task: Task
    item: Item


def sets(data: Path, count: int) -> dict[str, list[Asked]]:
    """Up to `count` items of every set, drawn at random with a fixed seed."""
    multi_hop = {"hotpotqa": "hotpot_train_100", "2wikimultihopqa": "2wiki_train_500", "musique": "musique_train_100"}
    found = {
        f"nq, gold {place}": _items("nq", data / NQ.format(position))
        for place, position in (("first", 0), ("middle", 4), ("last", 9))
    }
    for name, file in multi_hop.items():
        task = {"2wikimultihopqa": "2wiki"}.get(name, name)
        there = _items(task, data / name / f"{file}.jsonl.gz")
        found[name] = [one for one in there if is_held_out(asked(one.item.question, "")["question"])]
    found["triviaqa"] = _items("triviaqa", data / "triviaqa" / "triviaqa-sample.tgz")
    found["morehopqa"] = _items("morehopqa", data / "morehopqa" / "morehopqa_final_150samples.jsonl.gz")
    found["stories"] = list(_stories(data))
    chosen = {}
    for name, items in found.items():
        order = "nq" if name.startswith("nq") else name  # the same questions with the gold passage elsewhere
        chosen[name] = random.Random(order).sample(items, min(count, len(items)))
    return chosen


def _items(task: str, path: Path) -> list[Asked]:
    chosen = get(task)
    return [Asked(chosen, item) for item in read(chosen, path).items]


def _stories(data: Path) -> Iterator[Asked]:
    """Questions about the sections of held-out stories, shuffled; a section reads the one before it."""
    task = get("hotpotqa")
    for number, record in enumerate(over_stories(data, [], True, random.Random(0))):
        documents = tuple(Document(d["text"], d["title"]) for d in record["documents"])
        links = tuple((source, reader) for source, reader in record["links"])
        one = random.Random(number).choice(record["questions"])
        cluster = documents[0].title
        yield Asked(
            task, Item(f"story-{number}", one["question"], (one["answer"],), documents, links=links, cluster=cluster)
        )


def edges_of(spec: str, one: Asked) -> tuple[Edge, ...] | None:
    """The edges that a row names; None if the row asks for links and the documents have none."""
    item = one.item
    if spec not in ("links", "random"):
        return prompt.edges_of(item, spec) if spec else ()
    links = item.links or (() if one.task.name == "nq" else _named(item))  # retrieved passages have none
    if not links or spec == "links":
        return links or None
    count = len(item.documents)
    others = [(s, r) for s in range(count) for r in range(count) if s != r and (s, r) not in links]
    return tuple(random.Random(item.id).sample(others, min(len(links), len(others))))


def _named(item: Item) -> tuple[Edge, ...]:
    """Links between paragraphs: one names the other's title."""
    documents = [{"title": d.title, "text": d.text} for d in item.documents]
    return tuple(
        (s, r) for r, reader in enumerate(documents) for s, source in enumerate(documents) if names(reader, source)
    )


def measured(engine: Engine, one: Asked, ways: Sequence[str], timed: bool) -> dict[str, dict[str, Any]]:
    """One item by each of these methods that can lay it out, its documents encoded first.

    timed: time the first tokens, one by one. All methods' answers are generated in one batch, and scored and generated answers
    share the question, which is faster.
    """
    told, requests = {}, {}
    params = SamplingParams(max_tokens=ANSWER_TOKENS, stop=(*one.task.stop, "\n"))
    for way in ways:
        spec, named = WAYS[way]
        edges = edges_of(named, one)
        if edges is None:
            continue
        method = methods.parse(spec)
        graph = prompt.build(one.task, one.item, engine.model.tokenizer).graph(edges)
        try:
            plan = engine.plan(graph, method)
            encoded = engine.encode(graph, method, progress=False)
        except (GraphError, PlanError):  # more documents than link tokens, or positions than the model has
            continue
        ids = engine.tokenize(one.item.references[0])
        scored = engine.wait(engine.submit(_continued(plan, ids[:-1]), SamplingParams(max_tokens=1), answer=ids))
        requests[way] = engine.submit(_continued(plan, []), params)
        told[way] = {
            "nats": -float(scored.scores.mean()),
            "prompt": sum((place.hi or 0) - place.lo for place in plan.prompt.sees) + len(plan.prompt),
            "encoded": encoded.computed_tokens + sum(encoded.reused_tokens.values()),
            "computed": sum(len(span) for span in plan.spans if not span.cached),
            "ttft": engine.generate(graph, method, max_tokens=1).usage.ttft if timed else None,
        }
    for way, request in requests.items():
        answer = engine.wait(request).text
        told[way] |= {"right": substring_em(answer, one.item.references), "answer": answer}
    return told


def _continued(plan: Plan, more: Sequence[int]) -> Plan:
    """The plan with more tokens after its prompt. All of its tokens but the prompt's last are computed once for all such plans."""
    question = plan.prompt
    last = question.positions[-1]
    before = replace(question, tokens=question.tokens[:-1], positions=question.positions[:-1], cached=True)
    rest = replace(
        question,
        tokens=(*question.tokens[-1:], *more),
        positions=range(last, last + 1 + len(more)),
        sees=(*question.sees, Place(len(plan.spans) - 1, before.start)),
    )
    return Plan((*(replace(span, cached=True) for span in plan.spans[:-1]), before, rest), plan.method)


def run(
    engines: dict[str, Engine], found: dict[str, list[Asked]], rows: Path, asked_by: Sequence[str]
) -> list[dict[str, Any]]:
    """Ask what isn't in `rows` yet. Items of all sets take turns, so that an interrupted run has some of each."""
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    known = {(row["set"], row["id"], row["state"], row["way"]) for row in done}
    longest = max(map(len, found.values()))
    turns = [(i, name, items[i]) for i in range(longest) for name, items in found.items() if i < len(items)]
    with rows.open("a") as file, Progress("asking", len(turns) * len(engines)) as bar:
        for (i, name, one), (state, engine) in product(turns, engines.items()):
            ways = [way for way in asked_by if (name, one.item.id, state, way) not in known]
            for way, told in measured(engine, one, ways, timed=i % TIMED == 0).items():
                key = {"set": name, "id": one.item.id, "cluster": one.item.cluster, "state": state, "way": way}
                done.append(key | told)
                file.write(json.dumps(done[-1]) + "\n")
            file.flush()
            bar.advance(1)
    return done


def table(done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each set, model and method, over the items that every method of that set and model answered.

    First those of all sets together, of NQ with the right passage anywhere, and of all sets whose documents have links.
    """
    sets = list(dict.fromkeys(row["set"] for row in done))
    linked = [name for name in sets if any(row["set"] == name and row["way"] == "graph-kv links" for row in done)]
    plain = [way for way in WAYS if way not in ("graph-kv links", "graph-kv random")]
    lines = []
    for name, members, ways in (
        (f"all {len(sets)} sets", sets, plain),
        ("nq, all three", [name for name in sets if name.startswith("nq")], plain),
        (f"the {len(linked)} with links", linked, list(WAYS)),
        *((name, [name], list(WAYS)) for name in sets),
    ):
        for state in STATES:
            mine = [row for row in done if row["set"] in members and row["state"] == state]
            there = [way for way in ways if any(row["way"] == way for row in mine)]
            by = {way: {(row["set"], row["id"]): row for row in mine if row["way"] == way} for way in there}
            ids = sorted(set.intersection(*map(set, by.values()))) if by else []
            lines += [_line(name, state, way, by, ids) for way in there if ids]
    return lines


def _line(
    name: str, state: str, way: str, by: dict[str, dict[tuple[str, str], Any]], ids: list[tuple[str, str]]
) -> dict[str, Any]:
    rows, full = [by[way][i] for i in ids], [by["full"][i] for i in ids]
    clusters = [row["cluster"] or row["id"].partition("@")[0] for row in rows]  # NQ asks a question three times
    right = mean_interval([row["right"] for row in rows], clusters)
    against = paired([row["right"] for row in full], [row["right"] for row in rows], clusters)
    more = [row["nats"] - other["nats"] for row, other in zip(rows, full, strict=True)]
    return {
        "set": name,
        "model": state,
        "method": way,
        "items": len(ids),
        "answer nats": mean(row["nats"] for row in rows),
        "above full": "" if way == "full" else f"{mean(more):+.2f} ± {_spread(more, clusters):.2f}",
        "right": f"{right.mean:.1%} [{right.low:.0%}, {right.high:.0%}]",
        "p against full": "" if way == "full" else p_text(against.p),
        "tokens": round(mean(row["prompt"] for row in rows)),
        "encoded": round(mean(row["encoded"] for row in rows)),
        "computed": round(mean(row["computed"] for row in rows)),
        "first token s": median([row["ttft"] for row in rows if row["ttft"] is not None] or [math.nan]),
    }


def _spread(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Half of the 95 % interval of a mean, by the normal distribution, if the values of a cluster depend on each other."""
    off: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        off[cluster] = off.get(cluster, 0.0) + value - mean(values)
    count = len(off)
    variance = count / (count - 1) * sum(x * x for x in off.values()) if count > 1 else float("nan")
    return 1.96 * variance**0.5 / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of public sets, in their own schemas")
    parser.add_argument("--items", type=int, default=24, help="of each set, at most")
    parser.add_argument("--sets", nargs="*", help="names, or beginnings of them [default: all]")
    parser.add_argument(
        "--rows", type=Path, default=Path("quality.rows.jsonl"), help="what was measured, one line each"
    )
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--table-only", action="store_true", help="only make the table from existing rows")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="methods to ask by [default: all]")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES), help="which models to ask")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = sets(args.data, args.items)
    if args.sets:
        found = {name: items for name, items in found.items() if name.startswith(tuple(args.sets))}
    if args.table_only:
        done = [json.loads(line) for line in args.rows.read_text().splitlines()]
    else:
        folder = demo.adapter()
        base = adapters.base_of(folder)
        given = {"base": None, "tuned": folder}
        engines = {
            state: Engine(models.load(base, adapter=given[state], device=args.device), kv_budget=KV)
            for state in args.states
        }
        done = run(engines, found, args.rows, args.ways)
    lines = table(done)
    if not lines:
        sys.exit("no item was asked by every method yet")
    missing = [name for name in sets(args.data, 1) if name not in {line["set"] for line in lines}]
    title = "Answers of SmolLM2-135M-Instruct by every method, as it comes and with the shipped adapter"
    if missing:
        title += f" (not measured yet: {', '.join(missing)})"
    report(title, lines, args)


if __name__ == "__main__":
    main()
