"""What edges that the data really has are worth: answers with no, true, random and nearest-neighbour edges.

    python -m benchmarks.edges SHARED_DATA --docs /usr/share/doc/python3-doc/html --items 40 --rows edges.rows.jsonl

Sets: WebKB's pages with their links, CL-SciSumm's and unarXive's citations, ExplaGraphs' triples, 2WikiMultiHopQA's evidence
triples, and hyperlinked documentation (Debian's package python3-doc, or any folder of HTML). `block` and `graph-kv` are asked
beside `full` with the documents in the data's order and shuffled. Random and nearest-neighbour edges give each document as many
sources as the true ones do, so only which they are differs; where one document truly reads all others, random edges let another
do so. The answer's negative log-likelihood is in nats a token. The model is
SmolLM2-135M-Instruct with the adapter that ships with kvgraph, or --model. A run that was stopped continues (--rows).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.common import report
from benchmarks.quality import Asked
from kvgraph import Engine, demo, methods, models
from kvgraph.data import prompt
from kvgraph.data.items import read
from kvgraph.data.task import Item
from kvgraph.data.tasks import get
from kvgraph.errors import GraphError, PlanError
from kvgraph.eval.metrics import METRICS
from kvgraph.eval.stats import mean_interval, p_text, paired
from kvgraph.graph import Edge
from kvgraph.progress import Progress

SETS = {  # name: (task, path in the folder of samples; "" for --docs)
    "webkb": ("topics", "webkb/webkb_Cornell.jsonl.gz"),
    "scisumm": ("scisumm", "scisumm"),
    "unarxive": ("unarxive", "unarxive/arXiv_src_2212_086.jsonl.gz"),
    "explagraphs": ("explagraphs", "expla_graphs/expla_graphs_500.jsonl.gz"),
    "2wiki-triples": ("2wiki-triples", "2wikimultihopqa/2wiki_train_500.jsonl.gz"),
    "linked-docs": ("linked-docs", ""),
}
NONE, TRUE, RANDOM, NEAR = EDGES = ("none", "true", "random", "near")
WAYS = {"full": ("full", NONE), "full shuffled": ("full", NONE), "block": ("block", NONE)}
WAYS |= {f"graph-kv {edges}": ("graph-kv", edges) for edges in EDGES}
ROOM = 3000  # tokens of an item's documents; longer ones are cut, all to the same length
ANSWER_TOKENS = 24
MOVES = 100  # tries to find another order


def sets(data: Path, docs: Path | None, count: int, model: models.Model) -> dict[str, list[Asked]]:
    """Up to `count` items of every set that have edges, at random but always the same."""
    found = {}
    for name, (task_name, path) in SETS.items():
        where = data / path if path else docs
        if where is None or not where.exists():
            continue
        task = get(task_name)
        items = [
            item for item in read(task, where).items if item.links and item.facts.get("related", "alone") == "alone"
        ]
        random.Random(name).shuffle(items)
        fitting = (Asked(task, short) for item in items if (short := fitted(item, model)) is not None)
        found[name] = [one for one, _ in zip(fitting, range(count), strict=False)]
    return found


def fitted(item: Item, model: models.Model) -> Item | None:
    """The item with its documents cut to ROOM tokens; None if that cuts an answer away that was there."""
    sizes = [len(model.tokenizer.encode(d.text, add_special_tokens=False)) for d in item.documents]
    longest = _level(sizes, ROOM)
    short = tuple(
        d if size <= longest else replace(d, text=d.text[: len(d.text) * longest // size])
        for d, size in zip(item.documents, sizes, strict=True)
    )
    answer = item.references[0].casefold()
    before, after = (any(answer in d.text.casefold() for d in found) for found in (item.documents, short))
    uncut = longest == max(sizes)
    return replace(item, documents=short) if (uncut or longest >= 16) and after == before else None


def _level(sizes: Sequence[int], room: int) -> int:
    """The largest length to which all can be cut so that they fit the room together."""
    low, high = 0, max(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(size, middle) for size in sizes) <= room else (low, middle - 1)
    return low


def edges_of(item: Item, kind: str) -> tuple[Edge, ...]:
    """The item's edges of a kind. Random and near ones give each reader as many sources as it truly has.

    Where every reader truly reads all others, no other sources can be drawn. Random edges are then the same graph over the
    documents in another order, and near ones are the true ones.
    """
    if kind in (NONE, TRUE):
        return item.links if kind == TRUE else ()
    count = len(item.documents)
    degrees = Counter(int(reader) for _, reader in item.links)
    vectors = weighed([f"{d.title}\n{d.text}" for d in item.documents]) if kind == NEAR else []
    chosen = []
    draw = random.Random(item.id)
    if kind == RANDOM and all(degree == count - 1 for degree in degrees.values()):
        for _ in range(MOVES):
            order = draw.sample(range(count), count)
            moved = tuple((order[int(source)], order[int(reader)]) for source, reader in item.links)
            if set(moved) != set(item.links):
                break
        return moved
    for reader, degree in sorted(degrees.items()):
        others = [i for i in range(count) if i != reader]
        if kind == RANDOM:
            sources = draw.sample(others, min(degree, len(others)))
        else:
            sources = sorted(others, key=lambda i: (-cosine(vectors[i], vectors[reader]), i))[:degree]
        chosen += [(source, reader) for source in sources]
    return tuple(chosen)


def weighed(texts: Sequence[str]) -> list[dict[str, float]]:
    """The words of each text with their tf-idf weights, of length 1."""
    counts = [Counter(re.findall(r"\w+", text.casefold())) for text in texts]
    seen = Counter(word for count in counts for word in count)
    vectors = []
    for count in counts:
        weights = {word: (1 + math.log(n)) * math.log(1 + len(texts) / seen[word]) for word, n in count.items()}
        length = math.sqrt(sum(weight * weight for weight in weights.values())) or 1.0
        vectors.append({word: weight / length for word, weight in weights.items()})
    return vectors


def cosine(a: dict[str, float], b: dict[str, float]) -> float:
    """The cosine of two vectors of length 1."""
    return sum(weight * b[word] for word, weight in a.items() if word in b)


def shuffled(item: Item) -> Item:
    """The item with its documents in another order, always the same."""
    order = list(range(len(item.documents)))
    random.Random(item.id).shuffle(order)
    return replace(item, documents=tuple(item.documents[i] for i in order), links=())


def measured(engine: Engine, one: Asked, way: str) -> dict[str, Any]:
    """One item in one way. Its documents' own KV may be in the engine already; what its answers are doesn't depend on it."""
    name, kind = WAYS[way]
    item = shuffled(one.item) if way == "full shuffled" else one.item
    graph = prompt.build(one.task, item, engine.model.tokenizer).graph(edges_of(item, kind))
    method = methods.parse(name)
    plan = engine.plan(graph, method)
    result = engine.generate(graph, method, max_tokens=ANSWER_TOKENS, stop=(*one.task.stop, "\n"))
    scores = engine.scores(graph, item.references[0], method)
    metric = METRICS[one.task.metrics[0]]
    return {
        "nats": -float(scores.mean()),
        "right": float(metric(result.text, item.references)),
        "documents": sum(len(span) for span in plan.spans if span.segment is not None),
        "question": len(plan.prompt),
        "answer": result.text,
    }


def run(model: models.Model, found: dict[str, list[Asked]], rows: Path) -> list[dict[str, Any]]:
    """Ask what isn't in `rows` yet. Items of all sets take turns, so that a run that is stopped has some of each."""
    done = stored(rows)
    known = {(row["set"], row["id"], row["way"]) for row in done}
    longest = max(map(len, found.values()), default=0)
    turns = [(name, items[i]) for i in range(longest) for name, items in found.items() if i < len(items)]
    todo = [(n, one, [w for w in WAYS if (n, one.item.id, w) not in known]) for n, one in turns]
    with rows.open("a") as file, Progress("asking", sum(len(ways) for _, _, ways in todo)) as bar:
        for name, one, ways in todo:
            with Engine(model, store=None) as engine:
                for way in ways:
                    try:
                        told = measured(engine, one, way)
                    except (GraphError, PlanError) as error:  # over the model's limit
                        told = {"skipped": str(error)}
                    done.append({"set": name, "id": one.item.id, "cluster": one.item.cluster, "way": way} | told)
                    file.write(json.dumps(done[-1]) + "\n")
                    file.flush()
                    bar.advance(1)
    return done


def stored(rows: Path) -> list[dict[str, Any]]:
    """What was measured. A last line that a killed run left unfinished is cut off."""
    if not rows.exists():
        return []
    content, end, _ = rows.read_bytes().rpartition(b"\n")
    rows.write_bytes(content + end)
    return [json.loads(line) for line in content.splitlines()]


def table(done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each set and way, over the items that were asked in every way."""
    lines = []
    for name in dict.fromkeys(row["set"] for row in done):
        by = {way: {row["id"]: row for row in done if (row["set"], row["way"]) == (name, way)} for way in WAYS}
        ids = sorted(set.intersection(*map(set, by.values())))
        ids = [i for i in ids if not any("skipped" in by[way][i] for way in WAYS)]
        lines += [_line(name, way, by, ids) for way in WAYS if ids]
    return lines


def _line(name: str, way: str, by: dict[str, dict[str, Any]], ids: list[str]) -> dict[str, Any]:
    rows, chance = [by[way][i] for i in ids], [by[f"graph-kv {RANDOM}"][i] for i in ids]
    clusters = [row["cluster"] or row["id"] for row in rows]
    right = mean_interval([row["right"] for row in rows], clusters)
    likely = mean_interval([math.exp(-row["nats"]) for row in rows], clusters)
    told = {
        "set": name,
        "way": way,
        "items": len(ids),
        "answer nats": mean(row["nats"] for row in rows),
        "probability of a token": f"{likely.mean:.3f} [{likely.low:.3f}, {likely.high:.3f}]",
        "right": f"{right.mean:.1%} [{right.low:.0%}, {right.high:.0%}]",
        "against random": "",
        "p": "",
        "document tokens": round(mean(row["documents"] for row in rows)),
        "question tokens": round(mean(row["question"] for row in rows)),
    }
    if way != f"graph-kv {RANDOM}":
        pairs = ([math.exp(-row["nats"]) for row in side] for side in (chance, rows))
        difference = paired(*pairs, clusters)
        more = [row["nats"] - other["nats"] for row, other in zip(rows, chance, strict=True)]
        told |= {"against random": f"{mean(more):+.3f} nats", "p": p_text(difference.p)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of public sets, in their own schemas")
    parser.add_argument("--docs", type=Path, help="a folder of HTML whose pages link to each other")
    parser.add_argument("--items", type=int, default=40, help="of each set, at most")
    parser.add_argument("--sets", nargs="*", choices=[*SETS], default=[*SETS])
    parser.add_argument("--model", default=None, help="another model than the one of `kvgraph demo`")
    parser.add_argument("--rows", type=Path, default=Path("edges.rows.jsonl"), help="what was measured, one line each")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--table-only", action="store_true", help="make the table of what there is")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.table_only:
        done = stored(args.rows)
    else:
        model = models.load(args.model or str(demo.adapter()), device=args.device)
        found = sets(args.data, args.docs, args.items, model)
        done = run(model, {name: found[name] for name in args.sets if name in found}, args.rows)
    lines = table(done)
    if not lines:
        sys.exit("no item was asked in every way yet")
    report("Answers with edges that the data has, and with others; p: paired with random edges", lines, args)


if __name__ == "__main__":
    main()
