"""Training records for the adapter of SmolLM2-135M-Instruct: questions over documents, of which the most don't answer them.

    python runs/smollm2_data.py SHARED_DATA OUT [--seed 0] [--rounds 2]

SHARED_DATA is a folder with public training sets in their own schemas (`qa_train/` and the multi-hop training samples; their
README says where each is from). OUT gets three folders, as `kvgraph data prepare` would make them:

passages: a passage among the most similar ones (TF-IDF) or random ones, and questions about all of them.
stories: sections of one story in random order, and questions about them; a link says that a section reads the one before it.
hops: paragraphs of which the answer needs two or more; a link says that a paragraph names the other's title.

Nothing of the sets that the adapter is tested on is trained on. A twelfth of the documents is for validation alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

HELD_OUT = 12  # one document in so many is for validation
WORDS = 1000  # of the documents of an example, at most
LEAST_WORDS = 500  # of passages to train on, the most is drawn from here up
DOCUMENTS = (3, 12)  # of an example over passages
PASSAGE_QUESTIONS = 24  # of an example over passages, at most: the documents cost most, and all questions share them
QUESTIONS = 6  # the same, over stories. The quality benchmark's questions about stories depend on it
PLAIN = 0.25  # share of examples that are asked as in a chat, without the evaluation's instruction
SEARCHED = 0.5  # share of questions that are written as for a search engine: in small letters, without a question mark
YES_OR_NO = 8  # one in so many of the questions that yes or no answers: few, because what they teach is two words

Document = dict[str, str]
Record = dict[str, Any]


class Passage(NamedTuple):
    """A document and the questions that it answers. key: which side of the split it is on depends on it alone."""

    document: Document
    questions: list[Document]
    key: str


def main() -> None:
    """Write the three folders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2, help="how often each passage and story comes, among others")
    options = parser.parse_args()
    pool = list(passages(options.data / "qa_train"))
    for name, make in (("passages", over_passages), ("stories", over_stories), ("hops", over_hops)):
        splits = {}
        for split, held_out in (("train", False), ("validation", True)):
            side = [passage for passage in pool if is_held_out(passage.key) == held_out]
            rng = random.Random(f"{options.seed}/{name}/{split}")
            rounds = 1 if held_out else options.rounds
            splits[split] = [r for _ in range(rounds) for r in make(options.data, side, held_out, rng)]
            rng.shuffle(splits[split])
            if split == "train":
                splits[split] = [varied(record, rng) for record in splits[split]]
        write(options.out / name, name, splits)
    write(options.out / "test-nq", "test-nq", {"train": [], "validation": list(tests(options.data))})


def tests(data: Path) -> Iterator[Record]:
    """Questions of the test set for a table; nothing is trained on them."""
    for r in lines(data / "nq" / "nq-open-10_total_documents_gold_at_4.jsonl.gz"):
        documents = [{"title": c["title"], "text": c["text"]} for c in r["ctxs"]]
        questions = [{"question": r["question"], "answer": r["answers"][0]}]
        yield {"task": "nq", "documents": documents, "questions": questions}


def is_held_out(key: str) -> bool:
    """Whether what has this key is for validation."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % HELD_OUT == 0


def lines(path: Path) -> Iterator[Record]:
    """The records of a gzipped file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def plain(text: str) -> str:
    """A text on one line, without HTML tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def asked(question: str, answer: Any) -> Document:
    """A question that reads like one, and its answer."""
    question = plain(question)
    answer = {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else plain(str(answer))
    return {"question": question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?"), "answer": answer}


def varied(record: Record, rng: random.Random) -> Record:
    """A record whose questions come in the ways in which people ask them."""
    questions = [searched(q) if rng.random() < SEARCHED else q for q in record["questions"]]
    return record | {"questions": questions} | ({"plain": True} if rng.random() < PLAIN else {})


def searched(question: Document) -> Document:
    """A question as somebody types it to search."""
    return question | {"question": question["question"].rstrip("?").lower()}


def passages(data: Path) -> Iterator[Passage]:
    """Passages with questions that each answers by itself."""
    found: dict[str, Passage] = {}

    def add(title: str, text: str, question: str, answer: Any, key: str = "") -> None:
        passage = found.setdefault(plain(text), Passage({"title": title, "text": plain(text)}, [], key or plain(text)))
        passage.questions.append(asked(question, answer))

    for r in lines(data / "squad_v1.1_train_first12.jsonl.gz"):
        add(r["title"].replace("_", " "), r["context"], r["question"], r["answers"][0]["text"])
    for r in lines(data / "squad_train_sample.jsonl.gz"):
        add("", r["context"], r["question"], r["answers"][0]["text"])
    for r in lines(data / "quoref_superni.jsonl.gz"):
        add("", r["context"], r["question"], r["answers"][0])
    for number, r in enumerate(lines(data / "boolq_train_sample.jsonl.gz")):
        if number % YES_OR_NO == 0:
            add(r["title"], r["passage"], r["question"], r["answer"])
    for number, r in enumerate(lines(data / "conditionalqa_train.jsonl.gz")):
        if r["evidences"] and not r["not_answerable"] and number % YES_OR_NO == 0:
            text = " ".join(r["evidences"])
            add("", text, f"{r['scenario']} {r['question']}", r["answers"][0][0], r["url"])
    return iter(found.values())


def over_passages(data: Path, pool: Sequence[Passage], held_out: bool, rng: random.Random) -> Iterator[Record]:
    """Each passage once, with its neighbours or with random ones, and questions about any of them."""
    near = nearest([f"{p.document['title']} {p.document['text']}" for p in pool], 24)
    for number, passage in enumerate(pool):
        count = rng.randint(*DOCUMENTS)
        others = list(near[number]) if rng.random() < 0.7 else rng.sample(range(len(pool)), min(24, len(pool)))
        chosen = [number, *(i for i in others if i != number)]
        words = WORDS if held_out else rng.randint(LEAST_WORDS, WORDS)
        yield gathered("nq", [pool[i] for i in fitting(pool, chosen, count, words)], passage, rng)


def fitting(pool: Sequence[Passage], chosen: Iterable[int], count: int, most: int) -> list[int]:
    """The first `count` of the chosen passages that have at most `most` words together."""
    kept, words = [], 0
    for i in chosen:
        size = len(pool[i].document["text"].split())
        if len(kept) < count and words + size <= most:
            kept.append(i)
            words += size
    return kept


def gathered(task: str, chosen: Sequence[Passage], first: Passage, rng: random.Random) -> Record:
    """A record over these passages in random order: some questions of the first, some of the others."""
    own = rng.sample(first.questions, min(6, len(first.questions)))
    others = [q for p in chosen if p is not first for q in p.questions]
    questions = own + rng.sample(others, min(PASSAGE_QUESTIONS - len(own), len(others)))
    documents = [p.document for p in chosen]
    rng.shuffle(documents)
    rng.shuffle(questions)
    return {"task": task, "documents": documents, "questions": questions}


def over_stories(data: Path, pool: Sequence[Passage], held_out: bool, rng: random.Random) -> Iterator[Record]:
    """Windows of every story's sections in random order, with questions about them."""
    questions: dict[tuple[str, str], list[Document]] = {}
    for r in lines(data / "qa_train" / "fairytaleqa_train.jsonl.gz"):
        if len(r["cor_section"]) == 1:
            questions.setdefault((r["story_name"], r["cor_section"][0]), []).append(
                asked(r["question"], r["answers"][0])
            )
    for story in lines(data / "qa_train" / "fairytaleqa_train_stories.jsonl.gz"):
        name = story["story_name"]
        if is_held_out(name) != held_out:
            continue
        for window in windows(story["sections"], rng):
            found = [q for section in window for q in questions.get((name, section["section"]), [])]
            if len(window) < 3 or not found:
                continue
            order = rng.sample(range(len(window)), len(window))
            at = {section: place for place, section in enumerate(order)}
            title = name.replace("-", " ")
            yield {
                "task": "hotpotqa",
                "documents": [{"title": title, "text": plain(window[i]["text"])} for i in order],
                "questions": rng.sample(found, min(QUESTIONS, len(found))),
                "links": [[at[i - 1], at[i]] for i in range(1, len(window))],
            }


def windows(sections: Sequence[Record], rng: random.Random) -> Iterator[list[Record]]:
    """A story's sections in its order, cut into parts of at most WORDS words and 8 sections, from a random place on."""
    most = rng.randint(5, 8)
    window: list[Record] = []
    for section in sections[rng.randint(0, min(2, len(sections) - 1)) :]:
        words = sum(len(s["text"].split()) for s in (*window, section))
        if window and (len(window) == most or words > WORDS):
            yield window
            window = []
        window.append(section)
    yield window


def over_hops(data: Path, pool: Sequence[Passage], held_out: bool, rng: random.Random) -> Iterator[Record]:
    """Questions over several paragraphs."""
    for record in (*whole(data, rng), *gold_only(data, rng)):
        if is_held_out(record["questions"][0]["question"]) != held_out:
            continue
        documents = record["documents"]
        rng.shuffle(documents)
        links = [
            [s, r] for r, reader in enumerate(documents) for s, source in enumerate(documents) if names(reader, source)
        ]
        yield record | {"links": links}


def names(reader: Document, source: Document) -> bool:
    """Whether a paragraph names another's title, leaving out what stands in brackets."""
    title = re.sub(r"\s*\(.*?\)", "", source["title"]).strip()
    return reader is not source and len(title) > 3 and title != reader["title"] and title in reader["text"]


def whole(data: Path, rng: random.Random) -> Iterator[Record]:
    """Records that bring paragraphs with titles, gold ones and distractors."""
    for file in ("hotpotqa/hotpot_train_100", "2wikimultihopqa/2wiki_train_500"):
        for r in lines(data / f"{file}.jsonl.gz"):
            documents = [{"title": title, "text": plain(" ".join(s))} for title, s in r["context"]]
            yield {"task": "hotpotqa", "documents": documents, "questions": [asked(r["question"], r["answer"])]}
    for r in lines(data / "musique" / "musique_train_100.jsonl.gz"):
        documents = [{"title": p["title"], "text": plain(p["paragraph_text"])} for p in r["paragraphs"]]
        gold = [d for d, p in zip(documents, r["paragraphs"], strict=True) if p["is_supporting"]]
        others = rng.sample([d for d in documents if d not in gold], 8)
        yield {"task": "hotpotqa", "documents": gold + others, "questions": [asked(r["question"], r["answer"])]}
    for r in lines(data / "qa_train" / "multihop_train_ircot_annotated.jsonl.gz"):
        documents = [{"title": p["title"], "text": plain(p["text"])} for p in r["paragraphs"]]
        if len(documents) > 2:
            yield {"task": "hotpotqa", "documents": documents[:12], "questions": [asked(r["question"], r["answer"])]}


def gold_only(data: Path, rng: random.Random) -> Iterator[Record]:
    """Records that bring the gold sentences alone: each is a document, with random ones of other records."""
    made = []
    for r in lines(data / "qa_train" / "hotpotqa_train_ecm.jsonl.gz"):
        made.append((r["evidence"], asked(r["question"], r["answer"])))
    for r in lines(data / "qa_train" / "strategyqa_train_facts.jsonl.gz"):
        if len(r["facts"]) > 1 and int(r["qid"], 16) % 6 == 0:
            made.append((r["facts"], asked(r["question"], r["answer"])))
    near = nearest([" ".join(facts) for facts, _ in made], 8)
    for number, (facts, question) in enumerate(made):
        others = [fact for i in near[number] if i != number for fact in made[i][0]]
        documents = [{"title": "", "text": plain(text)} for text in (*facts, *others[: rng.randint(4, 10)])]
        yield {"task": "hotpotqa", "documents": documents, "questions": [question]}


def nearest(texts: Sequence[str], count: int) -> np.ndarray:
    """The numbers of each text's most similar texts by TF-IDF, itself first: [texts, count]."""
    terms = [re.findall(r"\w+", text.lower()) for text in texts]
    number = {term: i for i, term in enumerate(dict.fromkeys(term for found in terms for term in found))}
    rows = np.repeat(np.arange(len(terms)), [len(found) for found in terms])
    columns = np.array([number[term] for found in terms for term in found])
    counts = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(terms), len(number)))
    weights = counts.log1p() @ _diagonal(np.log(len(terms) / np.bincount(counts.indices, minlength=len(number))))
    weights = _diagonal(1 / np.maximum(np.sqrt(weights.multiply(weights).sum(1)).A1, 1e-9)) @ weights
    return np.argsort(-(weights @ weights.T).toarray(), axis=1, kind="stable")[:, :count]


def _diagonal(values: np.ndarray) -> csr_matrix:
    places = np.arange(len(values))
    return csr_matrix((values.astype(np.float32), (places, places)))


def write(folder: Path, name: str, splits: dict[str, list[Record]]) -> None:
    """A folder as `kvgraph data prepare` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        named = ({"id": f"{name}-{split}-{i}"} | record for i, record in enumerate(records))
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in named)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    counts = {split: len(records) for split, records in splits.items()}
    (folder / "prepared.json").write_text(json.dumps({"source": name, "finished": True, "records": counts}) + "\n")
    print(name, counts)


if __name__ == "__main__":
    main()
