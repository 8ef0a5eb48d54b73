"""`kvgraph demo --world`: a small model that ships with the package answers questions by four methods."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from kvgraph import methods
from kvgraph.cli import common
from kvgraph.data import chat
from kvgraph.data.chat import Document
from kvgraph.data.world import tokenizer
from kvgraph.data.world.world import CHUNKS, HOPS, PRONOUN, SHUFFLED, WRONG, Corpus, World, WorldQuestion
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method

if TYPE_CHECKING:
    from kvgraph.engine.engine import Engine
    from kvgraph.engine.result import Result
    from kvgraph.models import Model

Answers = Mapping[str, Mapping[str, Sequence["Result"]]]  # by method and run

EACH = 20  # corpora of each kind, with one question each
SEED = 75  # its first corpora are short enough to show, and are answered like most others
DOCUMENTS = World(HOPS, seed=SEED, count=EACH, questions=1, entities=(2, 5), types=("1-hop", "2-hop"))
SHUFFLED_CHUNKS = World(CHUNKS, seed=SEED, count=EACH, questions=1, types=(PRONOUN,), order=SHUFFLED)
SPECS = {"full": "full", "block": "block", "kvlink": tokenizer.kvlink(4), "graph-kv": "graph-kv"}
RUNS = ("cold", "warm", "restart")
ANSWER_TOKENS = 8
TOLERANCE = 1e-4  # largest difference of logits, in standard deviations


class Asked(NamedTuple):
    """A question about a corpus of the synthetic world."""

    corpus: Corpus
    question: WorldQuestion

    def graph(self, model: Model, method: Method) -> ContextGraph:
        """The prompt, as in `kvgraph eval`, with the corpus' edges if the method reads them."""
        documents = [Document(segment.text) for segment in self.corpus.segments]
        prompt = chat.plain(model.tokenizer, "\n\n", documents, self.question.text, "{text}\n")
        return prompt.graph(self.corpus.edges if method.reads_edges else ())

    def is_right(self, result: Result) -> bool:
        """Whether the answer is right."""
        return result.text.strip() == self.question.answer


def demo() -> None:
    """The demo of the synthetic world, whole."""
    from kvgraph import demo as content

    model = common.load_model(str(content.model()), "float32", "cpu", False)
    with tempfile.TemporaryDirectory(prefix="kvgraph-demo-") as folder:
        _run(model, Path(folder))


def _run(model: Model, folder: Path) -> None:
    documents, chunks = _asked(DOCUMENTS), _asked(SHUFFLED_CHUNKS)
    _introduce(model, documents[0], chunks[0])
    ready = {name: methods.parse(spec) for name, spec in SPECS.items()}
    answers = _answers(model, ready, [*documents, *chunks], folder)
    columns = ("method", "asked", "question 1", "question 2", "like 1", "like 2", "computed", "memory", "disk")
    table = common.table(*columns, "first token", left=4)
    for name, runs in answers.items():
        for run, results in runs.items():
            table.add_row(name, run, *_row(documents, chunks, results), end_section=run == RUNS[-1])
    guesses = (f"{sum(one.question.floor for one in some):.0f}/{EACH}" for some in (documents, chunks))
    table.add_row("guessing", "", "", "", *guesses)
    common.show(table)
    _explain(model, {name: _right(chunks, runs[RUNS[0]][EACH:]) for name, runs in answers.items()})
    _check(model, ready, answers, [documents[0], chunks[0]])


def _asked(world: World) -> list[Asked]:
    return [Asked(corpus, corpus.questions[0]) for corpus in world]


def _introduce(model: Model, about_documents: Asked, about_chunks: Asked) -> None:
    size = model.parameters / 1e6
    typer.echo(f"""\
A small model that ships with kvgraph ({size:.1f} million parameters) answers questions about documents.
It was trained on an invented world of short sentences and knows nothing else. The names below were
not in its training data, so right answers come from reading. The model's KV cache of a document is
kept and used again for every question.

1. Short documents. Some questions need two of them.
""")
    _tell(about_documents, edges=False)
    typer.echo("""
2. Documents cut into chunks and shuffled. Only edges tell whom a chunk means by "she": it reads the
   first chunk of its document.
""")
    _tell(about_chunks, edges=True)
    typer.echo(f"""
Four methods answer both, and {EACH - 1} more questions of each kind about other documents:

   full      computes each document after all those before it, as in an ordinary prompt
   block     computes each document alone
   kvlink    computes each document alone, and four link tokens after each with the question
   graph-kv  computes each document alone, then again after those it reads; only it uses the edges

cold: nothing is stored yet. warm: asked again. restart: a new engine, which finds the stored caches
on disk. Tokens computed, or found in memory or on disk, are the mean per question; the time to the
first token is the median.
""")


def _tell(asked: Asked, *, edges: bool) -> None:
    """Show a corpus and the question about it."""
    sources = {reader: source for source, reader in asked.corpus.edges}
    for i, segment in enumerate(asked.corpus.segments):
        reads = f"reads {sources[i]}" if edges and i in sources else ""
        typer.echo(f"   {i:>2}  {reads:<9}  {segment.text}" if edges else f"   {i:>2}  {segment.text}")
    typer.echo(f"\n   {asked.question.text} ...   (right: {asked.question.answer})")


def _answers(model: Model, ready: Mapping[str, Method], asked: Sequence[Asked], folder: Path) -> Answers:
    """The answers to all questions, one by one: cold, warm, and from a new engine on the same disk store."""
    from kvgraph.engine.engine import Engine
    from kvgraph.progress import Progress

    found: dict[str, dict[str, list[Result]]] = {name: {run: [] for run in RUNS} for name in ready}
    with Progress("asking", len(ready) * len(RUNS) * len(asked)) as bar:
        for (name, method), runs in product(ready.items(), (RUNS[:2], RUNS[2:])):
            with Engine(model, store=folder / name) as engine:
                for run, one in product(runs, asked):
                    found[name][run].append(_answer(engine, method, one))
                    engine.flush()  # so that no question waits for storing the one before it
                    bar.advance(1)
    return found


def _answer(engine: Engine, method: Method, asked: Asked) -> Result:
    result: Result = engine.generate(asked.graph(engine.model, method), method, max_tokens=ANSWER_TOKENS, stop=(".",))
    return result


def _row(documents: Sequence[Asked], chunks: Sequence[Asked], results: Sequence[Result]) -> Iterator[str]:
    """The columns of one run: the first answers of both kinds, how many are right, and their cost."""
    kinds = (documents, results[:EACH]), (chunks, results[EACH:])
    for asked, found in kinds:
        yield f"{found[0].text.strip()[:8] or 'nothing'} {'✓' if asked[0].is_right(found[0]) else '✗'}"
    for asked, found in kinds:
        yield f"{_right(asked, found)}/{EACH}"
    usages = [result.usage for result in results]
    yield f"{statistics.mean(usage.computed_tokens for usage in usages):,.0f}"
    for tier in ("memory", "disk"):
        yield f"{statistics.mean(usage.reused_tokens.get(tier, 0) for usage in usages):,.0f}"
    yield common.human_time(statistics.median(usage.ttft for usage in usages))


def _right(asked: Sequence[Asked], results: Sequence[Result]) -> int:
    return sum(one.is_right(result) for one, result in zip(asked, results, strict=True))


def _explain(model: Model, right: Mapping[str, int]) -> None:
    """What edges changed for the second kind of question. right: how many of them each method answered."""
    from kvgraph.engine.engine import Engine

    told = _asked(replace(SHUFFLED_CHUNKS, edges=WRONG))
    with Engine(model) as engine:
        results = [_answer(engine, methods.parse("graph-kv"), one) for one in told]
    wrong = _right(told, results)
    as_told = sum(result.text.strip() == one.question.edges_say for one, result in zip(told, results, strict=True))
    others = ", ".join(f"{name} {count}" for name, count in right.items() if name != "graph-kv")
    typer.echo(f"""
Of the {EACH} questions like 2, graph-kv answers {right["graph-kv"]} ({others}). With wrong edges
{wrong} of its answers are right, and {as_told} follow the wrong edges. This is a tiny model in a synthetic
world. It shows what edges can carry, not how good a method is on real text; `kvgraph eval` measures
that. The same information can also be given in plain text (docs/reference/world.md).
""")


def _check(model: Model, ready: Mapping[str, Method], answers: Answers, asked: Sequence[Asked]) -> None:
    """Print that reuse changed nothing. Raises KVGraphError if it did."""
    different = [name for name, runs in answers.items() if not _same(runs)]
    _say(not different, "cold, warm and restarted answers are the same tokens, and only cold ones compute documents")
    worst = {name: max(_difference(model, method, one) for one in asked) for name, method in ready.items()}
    for name, difference in worst.items():
        what = f"{name:8}  logits differ from those of one dense forward by {difference:.1e} standard deviations"
        _say(difference <= TOLERANCE, what)
    typer.echo("\nNext: `kvgraph encode --help`, and `kvgraph check MODEL` for a model of your own.")
    if different or max(worst.values()) > TOLERANCE:
        raise KVGraphError("the demo found a difference: please report it, with the output above")


def _same(runs: Mapping[str, Sequence[Result]]) -> bool:
    """Whether all runs gave the same tokens, and only the cold one computed documents."""
    cold, *again = runs.values()
    same = all(r.token_ids == c.token_ids for results in again for r, c in zip(results, cold, strict=True))
    return same and not any(r.usage.document_tokens_computed for results in again for r in results)


def _difference(model: Model, method: Method, asked: Asked) -> float:
    """Largest difference of the engine's logits from one dense forward's, in standard deviations of the latter."""
    import torch

    from kvgraph.engine.engine import Engine

    with Engine(model) as engine:
        plan = engine.plan(asked.graph(model, method), method)
        dense = plan.dense()
        expected = model.dense(*(torch.from_numpy(a) for a in (dense.tokens, dense.positions, dense.visible)))[-1]
        engine.logits(plan)  # so that the next call reads only stored KV
        return float((engine.logits(plan) - expected).abs().max() / expected.std())


def _say(ok: bool, what: str) -> None:
    typer.echo(f"   {'✓' if ok else '✗'} {what}")
