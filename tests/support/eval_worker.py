"""An evaluation that may be killed. Run as a program: `eval_worker.py MODEL FOLDER`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from kvgraph import Engine, demo, models
from kvgraph.data.chat import Document
from kvgraph.data.task import Item, Task
from kvgraph.eval.run import evaluate

METHOD = "graph-kv"
TASK = Task(
    name="island",
    about="the demo's questions over three of its documents",
    source="kvgraph.demo",
    items=lambda records: (),
    instruction="Here are documents about an island.",
    question="Question: {question}\nAnswer:",
    max_tokens=8,
    metrics=("string_match_all", "substring_em"),
    edges="top-k:1",
    breakdowns=("kind", "first"),
)


def items(count: int = 12) -> list[Item]:
    """`count` questions, each over three neighbouring documents; the answers are random bytes, so a gold is a letter."""
    documents = [Document(d.text[:50], id=d.name) for d in demo.documents()]
    asked = demo.questions()
    return [
        Item(
            id=f"q{i}",
            question=asked[i % len(asked)],
            references=tuple("etaoinshrdlucmwfgyp"),
            documents=tuple(documents[(i + k) % len(documents)] for k in range(3)),
            kind="even" if i % 2 == 0 else "odd",
            facts={"first": i % len(documents)},
        )
        for i in range(count)
    ]


def main() -> None:
    """The whole evaluation, as a user's process would do it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, folder = models.load(sys.argv[1]), Path(sys.argv[2])
    with Engine(model, store=folder.with_name(f"{folder.name}-kv")) as engine:
        evaluate(engine, TASK, METHOD, items(), folder, window=4)


if __name__ == "__main__":
    main()
