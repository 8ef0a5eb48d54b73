"""Evaluation of questions over shared documents: requests batched by the scheduler, against one by one. Answers are equal."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import arguments, interleaved, median, report
from kvgraph import Engine, demo, models
from kvgraph.data.chat import Document
from kvgraph.data.task import Item, Task
from kvgraph.eval.run import WINDOW, evaluate

TASK = Task(
    name="island",
    about="questions over the demo's documents, which all items share",
    source="kvgraph.demo",
    items=lambda records: (),
    instruction="Here are documents about an island.\n\n",
    question="Question: {question}\nAnswer:",
    max_tokens=32,
    metrics=("substring_em",),
)


def items(count: int) -> list[Item]:
    """`count` questions over the same ten documents."""
    documents = tuple(Document(d.text, id=d.name) for d in demo.documents())
    asked = demo.questions()
    return [Item(f"{i}", f"{i}. {asked[i % len(asked)]}", ("-",), documents) for i in range(count)]


def main() -> None:
    args = arguments(__doc__, items=64, new=32, method="block", repeats=3)
    folder = Path(tempfile.mkdtemp())
    demo.write_model(folder)
    model = models.load(str(folder), device=args.device)
    questions = items(args.items)
    predictions: dict[str, list[str]] = {}

    def side(name: str, window: int) -> Callable[[], None]:
        def run() -> None:
            with tempfile.TemporaryDirectory() as out, Engine(model) as engine:
                evaluate(engine, TASK, args.method, questions, out, max_tokens=args.new, window=window, progress=False)
                lines = (Path(out) / "results.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
                predictions[name] = [json.loads(line)["prediction"] for line in lines]

        return run

    batched, single = f"{WINDOW} at once", "one by one"
    times = interleaved({batched: side(batched, WINDOW), single: side(single, 1)}, args.repeats, args.device)
    assert predictions[batched] == predictions[single], "batching changed an answer"
    rate = {name: args.items / median(seconds) for name, seconds in times.items()}
    report(
        f"Evaluating {args.items} questions over the same {len(questions[0].documents)} documents, {args.new} tokens each",
        [{"requests": name, "seconds": median(times[name]), "items/s": rate[name]} for name in times],
        args,
        {"items/s of batched / one by one": (rate[batched] / rate[single], ">= 3")},
    )


if __name__ == "__main__":
    main()
