"""Retrieval: recall of the passages that hold the answer, by words, by embeddings, fused, and along a graph.

Two collections of real questions (`--data`, their folder): Natural Questions (the passages of 441 questions, one of which
holds the answer), and 2WikiMultiHopQA (a corpus of 6,119 passages and the paragraphs of 500 questions, two to four of which
are needed). In the graph a passage reads those whose titles its text mentions, as an encyclopedia would link them.

Every second question is asked; the constants of the search along the graph were chosen on the others.

The first run embeds all passages, which takes minutes; --cache keeps the indexes.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import arguments, report
from kvgraph.data.retrieval import SearchIndex
from kvgraph.models.embedder import SentenceEmbedder

NQ = "nq/nq-open-10_total_documents_gold_at_0.jsonl.gz"
WIKI_CORPUS, WIKI = "2wikimultihopqa/2wikimultihopqa_corpus.jsonl.gz", "2wikimultihopqa/2wiki_train_500.jsonl.gz"
LONGEST = 8  # words of a title that is looked for
MOST = 10  # passages that one reads
DEPTHS = (5, 10)
SAMPLES = 1000  # of the bootstrap


class Passage(NamedTuple):
    """One of a collection."""

    id: str
    title: str
    text: str


class Question(NamedTuple):
    """A question, and the ids of the passages that it needs."""

    text: str
    needs: frozenset[str]


def nq(data: Path) -> tuple[list[Passage], list[Question]]:
    """The passages of all questions; each question needs one."""
    known: dict[tuple[str, str], str] = {}
    questions = []
    for record in _lines(data / NQ):
        ids = [known.setdefault((c["title"], c["text"]), f"{len(known)}") for c in record["ctxs"]]
        gold = [id for id, c in zip(ids, record["ctxs"], strict=True) if c["isgold"]]
        questions.append(Question(record["question"], frozenset(gold)))
    return [Passage(id, title, text) for (title, text), id in known.items()], questions


def wiki(data: Path) -> tuple[list[Passage], list[Question]]:
    """The corpus, and the paragraphs of the questions; a question needs those that its supporting facts are in."""
    texts = {record["title"]: record["text"] for record in _lines(data / WIKI_CORPUS)}
    questions = []
    for record in _lines(data / WIKI):
        for title, sentences in record["context"]:
            texts.setdefault(title, " ".join(sentences))
        needs = frozenset(title for title, _ in record["supporting_facts"])
        if needs <= texts.keys():
            questions.append(Question(record["question"], needs))
    return [Passage(title, title, text) for title, text in texts.items()], questions


def _lines(path: Path) -> Iterable[Any]:
    with gzip.open(path) as file:
        for line in file:
            yield json.loads(line)


def mentions(passages: Sequence[Passage]) -> dict[str, list[str]]:
    """What each passage reads: those whose titles, without what is in parentheses, stand in its text, at most MOST."""
    by_title: dict[str, list[str]] = {}
    for passage in passages:
        name = " ".join(re.findall(r"\w+", passage.title.partition("(")[0].lower()))
        if len(name) > 3:
            by_title.setdefault(name, []).append(passage.id)
    reads = {}
    for passage in passages:
        words = re.findall(r"\w+", passage.text.lower())
        found: dict[str, None] = {}
        for start in range(len(words)):
            for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
                found |= dict.fromkeys(by_title.get(" ".join(words[start:end]), ()))
        found.pop(passage.id, None)
        reads[passage.id] = list(found)[:MOST]
    return reads


def rankings(index: SearchIndex, question: str, reads: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The ids found for a question in each way, best first."""
    most = max(DEPTHS)
    return {
        "words (BM25)": [index.ids[row] for row, _ in index.by_words(question, most)],
        "embeddings": [index.ids[row] for row, _ in index.by_vectors(question, most)],
        "fused": [hit.id for hit in index.search(question, most)],
        "fused + graph": [hit.id for hit in index.search(question, most, reads)],
    }


def recall(found: Sequence[str], needs: frozenset[str], depth: int) -> float:
    """The share of the needed passages among the first `depth`."""
    return len(needs.intersection(found[:depth])) / len(needs)


def interval(values: Sequence[float]) -> str:
    """The mean with its 95 % bootstrap interval, in percent."""
    draw = random.Random(0)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(SAMPLES))
    low, high = means[int(0.025 * SAMPLES)], means[int(0.975 * SAMPLES)]
    return f"{100 * sum(values) / len(values):.1f} ({100 * low:.1f}–{100 * high:.1f})"


def main() -> None:
    args = arguments(__doc__, data=Path("../shared/data"), cache=Path("retrieval-cache"), embedder="")
    embedder = SentenceEmbedder(args.embedder) if args.embedder else SentenceEmbedder()
    rows = []
    for name, load in (("NQ", nq), ("2WikiMultiHopQA", wiki)):
        passages, questions = load(args.data)
        questions = questions[1::2]
        index = SearchIndex.build(args.cache / name.lower(), passages, embedder, lambda text: print(text, flush=True))
        reads = mentions(passages)
        found, seconds = [], []
        for question in questions:
            started = time.perf_counter()
            index.search(question.text, max(DEPTHS), reads)
            seconds.append(time.perf_counter() - started)
            found.append(rankings(index, question.text, reads))
        for way in found[0]:
            row: dict[str, Any] = {
                "collection": name,
                "passages": len(passages),
                "questions": len(questions),
                "by": way,
            }
            for depth in DEPTHS:
                values = [recall(f[way], q.needs, depth) for f, q in zip(found, questions, strict=True)]
                row[f"recall@{depth}, % (95 %)"] = interval(values)
                whole = sum(value == 1 for value in values) / len(values)
                row[f"all found @{depth}, %"] = f"{100 * whole:.1f}"
            row["edges"] = sum(map(len, reads.values())) if "graph" in way else ""
            row["search ms"] = f"{1000 * sorted(seconds)[len(seconds) // 2]:.1f}" if "graph" in way else ""
            rows.append(row)
    report(f"Retrieval ({embedder.name})", rows, args)


if __name__ == "__main__":
    main()
