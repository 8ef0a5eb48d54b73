"""The world table: how often trained models answer questions of the synthetic world, by every method and with every control.

    python -m benchmarks.world MODEL [MODEL ...] --before BASE [BASE ...] --out benchmarks/results/world.json

Several models are several seeds of one recipe. `--before` names the models that their mixed training started from. All
models get the same questions about corpora with held-out names, with every method and every form of the corpus
(docs/reference/world.md), so all differences are paired.

Answers are judged without generating them. The documents and all questions about them are one packed forward, and an answer
is right if each of its tokens, including the full stop, is the likeliest: then greedy decoding gives it. A sample of every
case is asked again through the engine, as in `kvgraph eval`. If any of those answers is judged differently, the command ends
with an error.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import cpu_name
from kvgraph import Engine, methods, models
from kvgraph.data.tasks.world import WORLD_HOPS
from kvgraph.data.world import tokenizer
from kvgraph.data.world.world import CHUNKS, COMPARISON, HOPS, KEPT, SHUFFLED, TYPES
from kvgraph.engine.probe import deviations
from kvgraph.engine.sampling import SamplingParams
from kvgraph.errors import ModelError
from kvgraph.eval.stats import mean_interval
from kvgraph.methods import Method
from kvgraph.progress import Progress
from kvgraph.train.example import Example, Question
from kvgraph.train.forward import logits
from kvgraph.train.mixture import WorldSource, with_edges
from kvgraph.train.pack import Packed, pack

AFTER, BEFORE = "after", "before"
SEED = 1_000_000  # seed of the corpora; training and its evaluation use others
CORPORA = {HOPS: 140, CHUNKS: 110}  # enough corpora for 500 questions of every type
WORLDS = {
    HOPS: "hops,questions=16,types=1-hop+2-hop+3-hop+comparison+comparison",
    CHUNKS: "chunks,questions=12",
}
TOGETHER = 8  # corpora in one forward
TIE = 1e-3  # logits closer than this may have another order in the engine; these answers aren't compared
CHECKED = 8  # questions of every case that are also asked through the engine
MARKS = "<!-- the world table -->", "<!-- end of the world table -->"  # in a model card


# -- what is asked ----------------------------------------------------------------------------------------------------

PCW = "pcw (no edges)"
ROUNDS = {2: "graph-kv, 2 rounds", 3: "graph-kv, 3 rounds"}
SPECS = {
    "full": "full",
    "block": "block",
    "kvlink, 4 links": tokenizer.kvlink(4),
    "kvlink, 1 link": tokenizer.kvlink(1),
    "graph-kv": "graph-kv",
    **{name: f"graph-kv:rounds={rounds}" for rounds, name in ROUNDS.items()},
    PCW: "pcw",
    "epic, 2 tokens": "epic:k=2",  # the usual 16 would cover whole documents here
    "prompt-cache": "prompt-cache",
    "ape": "ape",
    "cacheblend": "cacheblend",
}
TRAINED = ("full", "block", "kvlink, 4 links", "graph-kv")  # that the world's recipes train
EDGES = {  # the edges of graph-kv in chunks, as settings of the world
    "edges=reversed": "reversed edges",
    "edges=random": "random edges",
    "edges=wrong,share=0.5": "half of edges wrong",
    "edges=wrong": "wrong edges",
    "edges=dropped,share=0.5": "half of edges dropped",
    "edges=dropped": "all edges dropped (pcw)",
}
TOLD = {  # substitutes for edges in plain text
    "prefix=id": "document ids in the text",
    "prefix=name": "names in the text",
    "order=sorted": "chunks sorted by document",
}


class Case(NamedTuple):
    """A method on one kind of world in one form. row: its name in the table; settings: of the world."""

    kind: str
    row: str
    spec: str
    settings: str = ""

    @property
    def order(self) -> str:
        """For chunks, the column of the table. Corpora sorted by edges were shuffled before."""
        return KEPT if f"order={KEPT}" in self.settings else SHUFFLED

    @property
    def follows(self) -> bool:
        """Whether to count how often the answer follows wrong edges."""
        return "edges=wrong" in self.settings


def cases() -> Iterator[Case]:
    """Every case of the table, in its order."""
    for name, spec in SPECS.items():
        if name != "kvlink, 1 link":
            yield Case(HOPS, name, spec)
    for name, spec in SPECS.items():
        if name not in (PCW, *ROUNDS.values()):  # edges of chunks have depth one, so further rounds change nothing
            yield from _both_orders(name, spec)
        if name == "graph-kv":
            for settings, what in EDGES.items():
                yield from _both_orders(f"{name}, {what}", spec, settings)
    for settings, what in TOLD.items():
        for name in ("full", "block", "kvlink, 4 links"):
            if settings == "order=sorted":
                yield Case(CHUNKS, f"{name}; {what}", SPECS[name], settings)
            else:
                yield from _both_orders(f"{name}; {what}", SPECS[name], settings)


def _both_orders(row: str, spec: str, settings: str = "") -> Iterator[Case]:
    for order in (KEPT, SHUFFLED):
        yield Case(CHUNKS, row, spec, ",".join(filter(None, (f"order={order}", settings))))


class Wanted(NamedTuple):
    """The facts about a question. follows: count whether the answer is the one that wrong edges give, not whether it is right."""

    kind: str
    corpus: str
    floor: float
    follows: bool = False


class Asked(NamedTuple):
    """The questions of a case, with those about one corpus in one example, in the order of `wanted`. packed: all of them laid
    out, unless the layout depends on the model."""

    method: Method
    examples: list[Example]
    wanted: list[Wanted]
    packed: list[Packed]


def asked(case: Case, tokens: Any, corpora: int) -> Asked:
    """The questions of a case about a number of corpora; `tokens` is the model's tokenizer."""
    method = methods.parse(case.spec)
    source = WorldSource(",".join(filter(None, (WORLDS[case.kind], case.settings))), tokens, SEED, held_out=True)
    examples, wanted = [], []
    for number in range(corpora):
        corpus = source.world.corpus(number)
        example = with_edges(source[number], "links" if method.reads_edges else "none", Random(number))
        questions = list(example.questions)
        wanted += [Wanted(question.kind, corpus.id, question.floor) for question in corpus.questions]
        for question, told in zip(corpus.questions, example.questions, strict=True):
            if case.follows and question.edges_say not in ("", question.answer):
                questions.append(Question(told.query, source.encode(f"{question.edges_say}.")))
                wanted.append(Wanted(question.kind, corpus.id, 0.0, follows=True))
        examples.append(Example(example.graph, questions))
    alike = method.trains_by_mask and not method.needs_probe
    return Asked(method, examples, wanted, laid_out(examples, [method] * corpora) if alike else [])


def laid_out(examples: Sequence[Example], chosen: Sequence[Method]) -> list[Packed]:
    """The examples, each with its own method, packed several to a sequence."""
    items = list(zip(examples, chosen, strict=True))
    return [pack(items[i : i + TOGETHER], 1 << 30)[0] for i in range(0, len(items), TOGETHER)]


# -- whether the answers are right ------------------------------------------------------------------------------------


class Learned(NamedTuple):
    """A model under test: an engine on it, and the same model as training sees it."""

    name: str
    engine: Engine
    trainable: models.Trainable


def load(folder: str) -> Learned:
    """The model in a folder, in float32. Ends the program if there is none or it doesn't have the world's tokenizer."""
    try:
        model = models.load(folder, dtype="float32")
    except ModelError as error:
        sys.exit(str(error))
    if model.tokenizer is None or model.tokenizer.get_vocab() != tokenizer.vocabulary():
        sys.exit(
            f"{folder} hasn't the world's tokenizer; train a model of the world first (docs/reference/training.md)"
        )
    model.tuned_for = tuple(methods.METHODS)  # no warnings: this measures how much worse untuned methods are
    return Learned(folder, Engine(model), models.trainable(model.hf))


def answered(model: Learned, asked: Asked) -> list[float]:
    """The margin of each answer: its logit minus the best other one, for the token with the smallest difference.

    Above 0, greedy decoding gives this answer; below 0, another. For a method that no mask expresses (ape), the margin is
    infinite with its sign: only the engine can run it, and it doesn't give the margin.
    """
    if not asked.method.trains_by_mask:
        return _through_engine(model, asked)
    packed = asked.packed or laid_out(asked.examples, [_selecting(model, e, asked.method) for e in asked.examples])
    with torch.no_grad():
        leads = [_leads(model, sequence) for sequence in packed]
    lengths = [len(question.answer) for example in asked.examples for question in example.questions]
    return [float(lead.min()) for lead in torch.cat(leads).split(lengths)]


def _leads(model: Learned, packed: Packed) -> torch.Tensor:
    """For every token to learn, its logit minus the best other one."""
    found, targets = logits(model.trainable, packed), packed.targets[:, None]
    return (found.gather(1, targets) - found.scatter(1, targets, -math.inf).amax(1, keepdim=True)).squeeze(1)


def _selecting(model: Learned, example: Example, method: Method) -> Method:
    """The method itself or, if the model selects the tokens to recompute, the method with that selection, for all questions."""
    if not method.needs_probe:
        return method
    return method.selecting(deviations(model.engine.model, example.graph, 1 << 30)[0])


def _through_engine(model: Learned, asked: Asked) -> list[float]:
    found = []
    for example in asked.examples:
        graphs = [(example.graph.with_query(question.query), question.answer) for question in example.questions]
        results = dict(model.engine.run(model.engine.prepare_score(*graph, asked.method) for graph in graphs))
        found += [math.inf if results[i].greedy else -math.inf for i in range(len(graphs))]
    return found


def compared(model: Learned, asked: Asked, found: Sequence[float]) -> tuple[int, int]:
    """Ask a sample through the engine, as `kvgraph eval` does: (answers compared, answers judged differently).

    Ties aren't compared.
    """
    params = SamplingParams(max_tokens=WORLD_HOPS.max_tokens, stop=WORLD_HOPS.stop)
    every = [(example, question) for example in asked.examples for question in example.questions]
    sample = [i for i in range(0, len(every), -(-len(every) // CHECKED)) if abs(found[i]) > TIE]
    graphs = [every[i][0].graph.with_query(every[i][1].query) for i in sample]
    results = model.engine.generate(graphs, asked.method, params)
    wrong = sum(
        (tuple(result.token_ids) == every[i][1].answer) != (found[i] > 0)
        for i, result in zip(sample, results, strict=True)
    )
    return len(sample), wrong


# -- the table --------------------------------------------------------------------------------------------------------


def cells(case: Case, stage: str, asked: Asked, found: Sequence[Sequence[float]]) -> Iterator[dict[str, Any]]:
    """A cell for each type of question, as JSON values; `found` has the margins of every model."""
    for kind in TYPES[case.kind]:
        rows = [i for i, row in enumerate(asked.wanted) if row.kind == kind and not row.follows]
        told = [i for i, row in enumerate(asked.wanted) if row.kind == kind and row.follows]
        yield {
            "stage": stage, "kind": case.kind, "row": case.row, "method": case.spec, "settings": case.settings,
            "order": case.order if case.kind == CHUNKS else "", "question": kind,
            "floor": fmean(asked.wanted[i].floor for i in rows),
            "follows": fmean(_shares(found, told)) if told else None,
            **mean_interval(_shares(found, rows), [asked.wanted[i].corpus for i in rows])._asdict(),
            "seeds": [fmean(margins[i] > 0 for i in rows) for margins in found],
        }  # fmt: skip


def _shares(found: Sequence[Sequence[float]], rows: Sequence[int]) -> list[float]:
    """For each question, the share of models that answer it right."""
    return [sum(margins[i] > 0 for margins in found) / len(found) for i in rows]


def tables(found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(title, rows) of the tables that show the cells to people."""
    titles = {HOPS: "People, firms and cities", CHUNKS: "Chunks that need each other"}
    for stage in (AFTER, BEFORE):
        for kind, title in titles.items():
            here = [cell for cell in found["cells"] if (cell["stage"], cell["kind"]) == (stage, kind)]
            if here:
                yield f"{title}, {stage} mixed training", _rows(here)


def _rows(cells: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Lines of one table: the floors of guessing, then a line for each row."""
    rows: dict[str, dict[str, str]] = {"guessing": {"% right": "guessing"}}
    for cell in cells:
        column = _column(cell)
        rows["guessing"][column] = f"{100 * cell['floor']:.1f}"
        rows.setdefault(cell["row"], {"% right": cell["row"]})[column] = _shown(cell)
        if cell["follows"] is not None:
            name = f"{cell['row']}: what these say"
            rows.setdefault(name, {"% right": name})[column] = f"{100 * cell['follows']:.1f}"
    return list(rows.values())


def _column(cell: dict[str, Any]) -> str:
    """ "pronoun, shuffled"; only the type of question if there is no order."""
    order = {KEPT: "in order", SHUFFLED: "shuffled"}.get(cell["order"])
    return f"{cell['question']}, {order}" if order else str(cell["question"])


def _shown(cell: dict[str, Any]) -> str:
    """98.3 [97.0, 99.1], and with several models the lowest and highest of them."""
    mean, low, high = (f"{100 * cell[key]:.1f}" for key in ("mean", "low", "high"))
    seeds = [f"{100 * share:.1f}" for share in sorted(cell["seeds"])]
    return f"{mean} [{low}, {high}]" + (f" {seeds[0]}–{seeds[-1]}" if len(seeds) > 1 else "")


def goals(found: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """The goals of the model that ships, which is the first: {figure: (measured, goal)}. Of several cells, the lowest or the
    highest counts and is named."""
    after = [cell for cell in found if cell["stage"] == AFTER]

    def share(cell: dict[str, Any]) -> float:
        return float(cell["seeds"][0])

    def shown(cell: dict[str, Any]) -> str:
        return f"{100 * share(cell):.1f} ({', '.join((cell['row'], _column(cell)))})"

    def lowest(cells: Sequence[dict[str, Any]]) -> str:
        return shown(min(cells, key=share))

    def chunks(row: str, *orders: str) -> list[dict[str, Any]]:
        return [c for c in after if (c["kind"], c["row"]) == (CHUNKS, row) and c["order"] in orders]

    def best(question: str) -> str:
        top = max((cell for cell in after if cell["question"] == question), key=share)
        return f"{shown(top)}, floor {100 * top['floor']:.1f}"

    few = [cell for cell in after if cell["question"] in ("1-hop", "2-hop")]
    return {
        "1- and 2-hop by methods it was trained by, the lowest": (
            lowest([c for c in few if c["row"] in TRAINED]),
            "≥ 95",
        ),
        "1- and 2-hop by any method, the lowest": (lowest(few), "≥ 95"),
        "chunks by graph-kv, the lowest": (lowest(chunks("graph-kv", KEPT, SHUFFLED)), "≥ 95 in any order"),
        "chunks by full, the lowest": (lowest(chunks("full", KEPT)), "≥ 95 in order"),
        "chunks by kvlink, the lowest": (lowest(chunks("kvlink, 4 links", KEPT)), "≥ 95 in order"),
        "3-hop, the highest": (best("3-hop"), "clearly above the floor"),
        "comparison, the highest": (best(COMPARISON), "clearly above the floor"),
    }


def measure(after: Sequence[str], before: Sequence[str], share: float = 1.0) -> dict[str, Any]:
    """All cells for these model folders, with the results of the check; for several models also `alone`, the same for the first
    ones. share: of the corpora, for a quick look.

    Ends the program with an error if the engine judges an answer otherwise.
    """
    stages = [(stage, list(map(load, folders))) for stage, folders in ((AFTER, after), (BEFORE, before)) if folders]
    every = list(cases())
    found: list[dict[str, Any]] = []
    alone: list[dict[str, Any]] = []
    checked = Counter[tuple[str, int]]()
    with Progress("the world table", len(every) * (len(after) + len(before))) as bar:
        for case in every:
            these = asked(case, stages[0][1][0].engine.model.tokenizer, max(2, round(share * CORPORA[case.kind])))
            for stage, learned in stages:
                answers = []
                for number, model in enumerate(learned):
                    answers.append(answered(model, these))
                    compare, different = compared(model, these, answers[-1])
                    if different:
                        sys.exit(
                            f"{model.name}, {case.row} ({case.kind} {case.settings}): the engine answers {different} of "
                            f"{compare} questions otherwise than the packed forward; please report it"
                        )
                    checked[stage, number] += compare
                    bar.advance(1, label=case.row)
                found += cells(case, stage, these, answers)
                alone += cells(case, stage, these, answers[:1])

    def told(cells: list[dict[str, Any]], count: int) -> dict[str, Any]:
        asked_again = sum(n for (_, number), n in checked.items() if number < count)
        return {"cells": cells, "compared": asked_again, "models": {AFTER: [*after[:count]], BEFORE: [*before[:count]]}}

    return told(found, len(after)) | ({"alone": told(alone, 1)} if len(after) > 1 else {})


def markdown(found: dict[str, Any]) -> list[str]:
    """A paragraph about the numbers, then the tables, as lines of Markdown."""
    lines = [explained(found)]
    for title, rows in tables(found):
        columns = list(rows[0])
        lines += ["", f"### {title}", "", "| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
        lines += ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in rows]
    return lines


def explained(found: dict[str, Any]) -> str:
    """A paragraph about the numbers."""
    after = len(found["models"][AFTER])
    counts = [cell["n"] for cell in found["cells"]]
    sentences = [
        "Each figure is the share of answers that are right as a whole, in %, with a 95 % interval. Questions about one corpus are one "
        "cluster of the interval.",
        f"After it come the lowest and the highest of {after} models trained with different seeds."
        if after > 1
        else "",
        f"Each cell covers {min(counts):,} to {max(counts):,} questions, about names that were never trained on.",
        "The line `guessing` is how often a guess is right that knows only the asked relation.",
        "The lines `what these say` are how often answers follow wrong edges that say something else.",
        f"{found['compared']:,} answers were compared with the engine's; all were the same.",
        "Goals are for the first model, which ships." if after > 1 else "",
    ]
    return " ".join(filter(None, sentences))


def write_card(folder: str | Path, found: dict[str, Any]) -> None:
    """Put the tables between the marks of the model card in a model's folder; the rest of the card is unchanged."""
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not all(text.count(mark) == 1 for mark in MARKS):
        sys.exit(f"{path} must hold the lines {MARKS[0]} and {MARKS[1]}, once each; the table goes between them")
    head, tail = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    table = "\n".join([MARKS[0], *markdown(found), MARKS[1]])
    path.write_text(head + table + tail, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of models of one recipe, one per seed")
    parser.add_argument(
        "--before", nargs="+", default=[], metavar="BASE", help="the models that their mixed training started from"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write everything here, as JSON")
    parser.add_argument(
        "--card", action="store_true", help="put the tables of the first MODEL, alone, into its README.md"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the questions, for a quick look (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    found = measure(args.models, args.before, args.share)
    for title, rows in tables(found):
        _print(title, rows)
    for name, (value, goal) in goals(found["cells"]).items():
        print(f"{name}: {value} (goal: {goal})")
    print(f"\n{explained(found)}\n{time.perf_counter() - started:,.0f} s")
    shipped = found.pop("alone", found)
    if args.out:
        environment = {
            "command": "python -m benchmarks.world " + " ".join(sys.argv[1:]), "hardware": cpu_name(),
            "threads": args.threads, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__,
        }  # fmt: skip
        title = "The synthetic world: what trained models answer by every method"
        written = {"title": title, "environment": environment, **found, "goals": goals(found["cells"])}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(written, indent=1) + "\n")
    if args.card:
        write_card(args.models[0], shipped)


def _print(title: str, rows: list[dict[str, str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in rows[0]))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
