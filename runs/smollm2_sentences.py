"""Training records whose answers are the model's own sentences, for the adapter of SmolLM2-135M-Instruct.

    python runs/smollm2_sentences.py SHARED_DATA DATA --minutes 15

The model reads the right passage alone, by `full`, and answers in its own words. An answer that holds the right one is kept. Where it
doesn't, the model is asked again and told the right one, as in STaR (arXiv 2203.14465, section 3.2); a sentence that holds it is kept as
if it had come without. The records ask these questions over seven to twelve similar passages, so that what is learned is to find the
passage and to answer as before, by every method. SHARED_DATA and DATA are those of runs/smollm2_data.py, which comes first. DATA gets a folder `sentences`, and
`sentences.answers.jsonl`, the answers; an interrupted run goes on from these.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvgraph import Engine, SamplingParams, demo, models
from kvgraph.data import prompt
from kvgraph.data.chat import Document
from kvgraph.data.task import Item
from kvgraph.data.tasks import get
from kvgraph.eval.metrics import substring_em
from kvgraph.models import adapters
from kvgraph.progress import Progress
from runs.smollm2_data import SEARCHED, Passage, Record, fitting, is_held_out, nearest, passages, searched, write

BATCH = 32  # questions that are answered together
TOKENS = 40  # of an answer; longer ones aren't kept
TOLD = '{} Answer in one sentence with the words "{}".'  # the question and the right answer
MORE = (
    3  # words that a told sentence needs besides the answer; a bare answer would teach the model to give bare answers
)
LONGEST = 220  # words of a passage
WORDS = (750, 1050)  # of the documents of an example
DOCUMENTS = (7, 12)
QUESTIONS = 24  # of an example, at most
NEIGHBOURS = 40  # of a passage, from which its example's documents are taken
ROUNDS = 3  # how often each passage comes first
MOSTLY = 0.8  # share of examples over similar documents, and of those in which passages with questions come first
PLAIN = 0.15  # share of examples that are asked as in a chat, without the evaluation's instruction

Asked = tuple[Passage, str, str]  # a passage, a question, and its right answer


def main() -> None:
    """Answer questions until the time is over, then write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="SHARED_DATA")
    parser.add_argument("out", type=Path, help="DATA")
    parser.add_argument("--minutes", type=float, required=True, help="to answer questions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    held_out = options.out / "passages" / "validation.jsonl"
    if not held_out.exists():
        parser.error(f"there is no {held_out}; run `python runs/smollm2_data.py {options.data} {options.out}` first")
    torch.set_num_threads(options.threads)
    pool = [p for p in passages(options.data / "qa_train") if not is_held_out(p.key)]
    pool = [p for p in pool if len(p.document["text"].split()) <= LONGEST]
    file = options.out / "sentences.answers.jsonl"
    answer(pool, file, options.minutes)
    kept: dict[int, list[Record]] = defaultdict(list)
    for told in map(json.loads, file.read_text().splitlines()):
        if told["kept"]:
            kept[told["passage"]].append({"question": told["question"], "answer": told["answer"]})
    validation = map(json.loads, held_out.read_text().splitlines())
    splits = {
        "train": list(records(pool, kept)),
        "validation": [{k: v for k, v in r.items() if k != "id"} for r in validation],
    }
    write(options.out / "sentences", "sentences", splits)


def answer(pool: Sequence[Passage], file: Path, minutes: float) -> None:
    """Add answers to questions that the file doesn't have yet. All questions of a passage come after each other."""
    asked = every_question(pool)
    done = len(file.read_text().splitlines()) if file.exists() else 0
    engine = Engine(models.load(adapters.base_of(demo.adapter())), kv_budget=1 << 30)
    end = time.monotonic() + 60 * minutes
    with file.open("a") as out, Progress("answering", len(asked)) as bar:
        bar.advance(done)
        for at in range(done, len(asked), BATCH):
            batch = asked[at : at + BATCH]
            if time.monotonic() > end:
                return
            answers = sentences(engine, [(pool[i], q["question"], q["answer"]) for i, q in batch])
            for (i, q), found in zip(batch, answers, strict=True):
                out.write(json.dumps({"passage": i, "question": q["question"]} | found) + "\n")
            out.flush()
            bar.advance(len(batch))


def every_question(pool: Sequence[Passage]) -> list[tuple[int, Record]]:
    """(a passage's number, a question about it as it is asked) of all passages, in random order."""
    rng = random.Random(1)
    pairs = [(i, q) for i in rng.sample(range(len(pool)), len(pool)) for q in pool[i].questions]
    return [(i, searched(q) if rng.random() < SEARCHED else q) for i, q in pairs if q["answer"] not in ("yes", "no")]


def sentences(engine: Engine, asked: Sequence[Asked]) -> list[Record]:
    """What the model answers. If that lacks the right answer, it is what the model answers when it is told the right one."""
    answers = answered(engine, asked)
    missed = [n for n, found in enumerate(answers) if not found["kept"]]
    again = [(passage, TOLD.format(question, right), right) for passage, question, right in (asked[n] for n in missed)]
    for n, found in zip(missed, answered(engine, again), strict=True):
        longer = len(found["answer"].split()) >= len(asked[n][2].split()) + MORE
        answers[n] = found | {"kept": found["kept"] and longer, "told": True}
    return answers


def answered(engine: Engine, asked: Sequence[Asked]) -> list[Record]:
    """What the model answers over each passage alone, and whether it holds the right answer."""
    task, params = get("nq"), SamplingParams(max_tokens=TOKENS, stop=("\n",))
    graphs = []
    for passage, question, right in asked:
        document = Document(passage.document["text"], passage.document["title"])
        graphs.append(prompt.build(task, Item("", question, (right,), (document,)), engine.model.tokenizer).graph())
    found = []
    for (_, _, right), result in zip(asked, engine.generate(graphs, "full", params), strict=True):
        text = result.text.strip()
        kept = bool(text) and len(result.token_ids) < TOKENS and substring_em(text, (right,)) == 1
        found.append({"answer": text, "kept": kept})
    return found


def records(pool: Sequence[Passage], kept: dict[int, list[Record]]) -> Iterator[Record]:
    """Examples over similar passages, or random ones, with the questions about any of them."""
    near = nearest([f"{p.document['title']} {p.document['text']}" for p in pool], NEIGHBOURS)
    rng = random.Random(5)
    order = [i for _ in range(ROUNDS) for i in rng.sample(sorted(kept), len(kept))]
    for first in order:
        similar = rng.random() < MOSTLY
        others: Any = near[first].tolist() if similar else rng.sample(range(len(pool)), min(NEIGHBOURS, len(pool)))
        others = [i for i in others if i != first]
        if rng.random() < MOSTLY:
            others.sort(key=lambda i: i not in kept)
        chosen = fitting(pool, [first, *others], rng.randint(*DOCUMENTS), rng.randint(*WORDS))
        questions = [q for i in chosen for q in kept.get(i, ())]
        documents = [pool[i].document for i in rng.sample(chosen, len(chosen))]
        record = {
            "task": "nq",
            "documents": documents,
            "questions": rng.sample(questions, min(QUESTIONS, len(questions))),
        }
        yield record | ({"plain": True} if rng.random() < PLAIN else {})


if __name__ == "__main__":
    main()
