"""`kvgraph tune`: prompts from a user's documents without labels, the run that distils them, and its result.

There are three kinds of prompts: recitations ("Quote the passage titled ..."), which need no data and teach a question to find
its document; questions that the model itself writes about a passage; and given questions. Answers are the model's own under
`full`. A question is kept only if its answer depends on the passage.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvgraph import methods, models
from kvgraph.data import corpus, io
from kvgraph.data import prompt as prompts
from kvgraph.data.chat import Document
from kvgraph.data.task import Item
from kvgraph.engine.engine import Engine
from kvgraph.models import adapters
from kvgraph.progress import Progress
from kvgraph.train import checkpoint, distill, gap, model
from kvgraph.train.config import DISTILL, LORA, Component, Config, Stage, TrainError
from kvgraph.train.forward import logits
from kvgraph.train.pack import Packed
from kvgraph.train.records import PREPARED, TRAIN, VALIDATION, Records, prepared, task_of
from kvgraph.train.trainer import train

TASK = "nq"  # the task whose prompt questions get; half of the records have no prompt
WORDS = (60, 140)  # of a passage: a shorter one takes in the next paragraph, and a longer paragraph is cut
CONTEXT = 5  # passages of a record
RECITE = 5  # recitations of a record
HELD_OUT = 8  # one document in this many is held out
LENGTH = 4096  # tokens of a sequence
SCORED = 12  # held-out records in the table
DEPENDS = 0.3  # nats per token by which the passage must make an answer likelier
NAME = "tune"
WRITE = "Write one short question that the passage above answers. Give the question alone."
TOKENS = 40  # of a question or an answer that the model writes
CARD = "README.md"
MEASURED = "On held-out documents, before and after:"  # in the card of an adapter that `tune` made

Told = dict[str, Any]


@dataclass(frozen=True)
class Excerpt:
    """A piece of a document. document: its number, for the split. title: the document's."""

    title: str
    text: str
    document: str

    @property
    def record(self) -> dict[str, str]:
        """The passage as a document of a training record."""
        return {"title": self.title, "text": self.text}


@dataclass(frozen=True)
class Estimate:
    """The size of a run. tokens: of the student in all steps. seconds: of training, estimated from a timed step."""

    documents: int
    passages: int
    held_out: int
    records: int
    tokens: int
    seconds: float


def passages_of(documents: Sequence[corpus.CorpusDocument]) -> list[Excerpt]:
    """The passages of documents, cut at blank lines. Raises TrainError if there are too few to compose."""
    found = []
    for number, document in enumerate(documents):
        title = Path(document.name).stem if document.name else ""
        found += [Excerpt(title, text, document.name or str(number)) for text in _cut(document.text)]
    if len(found) < 2 * CONTEXT:
        raise TrainError(f"the documents make {len(found)} passages; {2 * CONTEXT} are the least to tune with")
    return found


def _cut(text: str) -> Iterator[str]:
    """A text in passages of about so many words."""
    least, most = WORDS
    words: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        words += paragraph.split()
        while len(words) > most:
            yield " ".join(words[:most])
            words = words[most:]
        if len(words) >= least:
            yield " ".join(words)
            words = []
    if len(words) >= least // 3:
        yield " ".join(words)


def split(passages: Sequence[Excerpt]) -> tuple[list[Excerpt], list[Excerpt]]:
    """(passages for training, held-out passages). Whole documents are held out; of a few long ones, the last passages of each."""
    names = list(dict.fromkeys(p.document for p in passages))
    if len(names) >= HELD_OUT:
        ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        kept = set(ranked[: max(1, len(names) // HELD_OUT)])
        held_out = [p for p in passages if p.document in kept]
    else:
        by_name = {name: [p for p in passages if p.document == name] for name in names}
        held_out = [p for found in by_name.values() for p in found[len(found) - len(found) // HELD_OUT :]]
    if len(held_out) < CONTEXT:  # a record needs this many
        held_out = list(passages[-CONTEXT:])
    return [p for p in passages if p not in held_out], held_out


def records_of(passages: Sequence[Excerpt], count: int, asked: Sequence[Told], rng: random.Random) -> Iterator[Told]:
    """`count` records, each of a passage, two more passages of its document and some others, with the questions about them."""
    by_text: dict[str, list[Told]] = {}
    for one in asked:
        by_text.setdefault(one["passage"], []).append({k: one[k] for k in ("question", "answer")})
    order: list[int] = []
    for number in range(count):
        order = order or rng.sample(range(len(passages)), len(passages))
        first = passages[order.pop()]
        same = [p for p in passages if p.document == first.document and p is not first]
        others = [p for p in passages if p.document != first.document]
        chosen = [first, *rng.sample(same, min(2, len(same)))]
        chosen += rng.sample(others, min(CONTEXT - len(chosen), len(others)))
        rng.shuffle(chosen)
        questions = [question for p in chosen for question in by_text.get(p.text, [])]
        yield {
            "id": f"{NAME}-{number}",
            "task": TASK,
            "plain": number % 2 == 0,
            "documents": [p.record for p in chosen],
            "questions": rng.sample(questions, min(3, len(questions))),
        }


def prepare(
    passages: Sequence[Excerpt],
    folder: Path,
    records: int,
    asked: Sequence[Told] = (),
    seed: int = 0,
    made_from: str = "",
) -> tuple[int, int]:
    """Write records of both splits as a prepared folder; returns the numbers of passages for training and held out.

    made_from: a hash of everything they are made from, for `is_prepared`.
    """
    rng = random.Random(seed)
    sides = split(passages)
    (folder / NAME).mkdir(parents=True, exist_ok=True)
    for name, side, count in ((TRAIN, sides[0], records), (VALIDATION, sides[1], SCORED)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records_of(side, count, asked, rng))
        (folder / NAME / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    io.write_json(folder / NAME / PREPARED, {"source": NAME, "finished": True, "made_from": made_from})
    return len(sides[0]), len(sides[1])


def hash_of(passages: Sequence[Excerpt], asked: Sequence[tuple[Excerpt, str]], *settings: int) -> str:
    """A hash of passages, given questions and settings, which is another one if any of them is."""
    facts = [[astuple(p) for p in passages], [[astuple(p), question] for p, question in asked], settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def is_prepared(folder: Path, made_from: str) -> bool:
    """Whether `prepare` has written a folder. Raises TrainError if that was from something else; older folders don't say."""
    if not (folder / NAME / PREPARED).is_file():
        return False
    if prepared(folder / NAME).get("made_from", made_from) != made_from:
        raise TrainError(
            f"{folder.parent} has data of other documents, questions, steps or seed; give another --out, or delete that "
            "folder to start anew"
        )
    return True


# -- questions -------------------------------------------------------------------------------------------------------


def written(engine: Engine, passages: Sequence[Excerpt], count: int, seed: int = 0) -> list[Told]:
    """Questions that the model writes about `count` passages, with its answers; kept if the answer depends on the passage."""
    chosen = random.Random(seed).sample(list(passages), min(count, len(passages)))
    task = task_of({"task": TASK, "plain": True})
    asked = [prompts.build(task, _item(p, WRITE), engine.model.tokenizer).graph() for p in chosen]
    with Progress("writing questions", len(chosen)) as bar:
        found = []
        for p, graph in zip(chosen, asked, strict=True):
            text = engine.generate(graph, "full", max_tokens=TOKENS).text.strip().split("\n")[0].strip(' "')
            bar.advance(1)
            if text.endswith("?") and len(text.split()) > 2:
                found.append((p, text))
    return answered(engine, found)


def answered(engine: Engine, asked: Sequence[tuple[Excerpt, str]]) -> list[Told]:
    """Questions about passages with the model's own answers under `full`, if the passage makes the answer likelier."""
    task, tokenizer, kept = task_of({"task": TASK}), engine.model.tokenizer, []
    with Progress("answering questions", len(asked)) as bar:
        for p, question in asked:
            bar.advance(1)
            graph = prompts.build(task, _item(p, question), tokenizer).graph()
            answer = engine.generate(graph, "full", max_tokens=TOKENS).text.strip()
            if not answer:
                continue
            without = prompts.build(task, Item("", question, ()), tokenizer).graph()
            nats = [-float(engine.score(g, answer, "full").scores.mean()) for g in (graph, without)]
            if nats[1] - nats[0] >= DEPENDS:
                kept.append({"passage": p.text, "question": question, "answer": answer})
    return kept


def _item(passage: Excerpt, question: str) -> Item:
    return Item("", question, (), (Document(passage.text, passage.title),))


def given(path: Path, passages: Sequence[Excerpt]) -> list[tuple[Excerpt, str]]:
    """Questions of a file, one per line or as JSON Lines with `question`, each with the passage that shares most words with it."""
    words = [set(re.findall(r"\w+", f"{p.title} {p.text}".lower())) for p in passages]
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(filter(str.strip, lines), 1):
        try:
            question = json.loads(line)["question"] if line.lstrip().startswith("{") else line.strip()
        except (ValueError, KeyError, TypeError):
            raise TrainError(f'{path}:{number} isn\'t a question, nor an object with a "question"') from None
        asked = set(re.findall(r"\w+", str(question).lower()))
        best = max(range(len(passages)), key=lambda i: len(asked & words[i]))
        found.append((passages[best], str(question)))
    return found


# -- the run ---------------------------------------------------------------------------------------------------------


def configuration(name: str, specs: Sequence[str], edges: Sequence[str], data: Path, **settings: Any) -> Config:
    """A run that distils `full` into these methods and keeps `full` unchanged."""
    for spec in specs:
        method = methods.parse(spec)
        if method.name == gap.FULL:
            raise TrainError("full is what every method is tuned towards; name another one")
        if spec == "kvlink":
            raise TrainError(
                "give kvlink the ids of its link tokens, for example kvlink:links=1,link_start=3,slots=14: rows that are "
                "new to the model can't be in an adapter"
            )
    tuned = Component(NAME, NAME, tuple(specs), 4.0, edges=tuple(edges), recite=RECITE)
    held = Component("held", NAME, (gap.FULL,), 1.0, recite=RECITE)
    steps = settings.pop("steps")
    common: dict[str, Any] = {"batch": 2, "length": LENGTH, "lr": 1e-3, "betas": (0.9, 0.99), "evaluation": 0}
    return Config(
        name=NAME,
        model=name,
        data=str(data),
        stages=(Stage((tuned, held), steps=steps),),
        objective=DISTILL,
        trained=LORA,
        **common | settings,
    )


def estimate(config: Config, passages: Sequence[Excerpt]) -> Estimate:
    """How long a run will take, estimated from one example forward and backward."""
    student = model.build(config)
    records = Records(Path(config.data) / NAME, TRAIN, student.tokenizer, recite=RECITE)
    method = methods.parse(config.stages[0].components[0].methods[0])
    sizes, seconds = [], 0.0
    for number in range(min(3, len(records))):
        found = records[number]
        if found is None:
            continue
        asked = distill.everything(found)
        laid = gap.laid_by(
            asked, (config.stages[0].components[0].methods[0], config.stages[0].components[0].edges[0]), 0
        )
        if laid is None:
            raise TrainError(f"{method.name} can't lay out a record of these documents")
        taught = distill.taught(asked, laid)
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            with torch.no_grad(), student.teaching():
                wanted = logits(student.trainable, taught, module=student.module)
            told = logits(student.trainable, laid, module=student.module)
        held = torch.zeros(len(laid.rows), dtype=torch.bool)
        distill.loss(told, wanted, held, hold=0.0, totals=(len(held), 0)).backward()
        seconds = time.perf_counter() - began  # the last one: the first warms up
        sizes.append(len(laid))
    if not sizes:
        raise TrainError("no record of these documents fits the model")
    examples = config.stages[0].steps * config.batch
    sides = split(passages)
    return Estimate(
        documents=len({p.document for p in passages}),
        passages=len(passages),
        held_out=len(sides[1]),
        records=len(records),
        tokens=examples * sum(sizes) // len(sizes),
        seconds=examples * seconds * sum(sizes) / len(sizes) / sizes[-1],
    )


def tune(config: Config, out: Path, say: Callable[[str], None] = lambda text: None) -> list[gap.GapRow]:
    """Run it, write the adapter to `out`, and measure it on the held-out documents. An interrupted run resumes.

    Raises TrainError as `kvgraph.train.trainer.train` and `check_out` do, and if the run was stopped before its end.
    """
    check_out(out, config.model)
    done = train(config, run_of(out))
    if done.signal is not None:
        raise TrainError(f"stopped after step {done.step:,}; the same command resumes from there")
    say("measuring it on held-out documents")
    made = done.checkpoint / checkpoint.ADAPTER
    lines = measured(config.model, made, Path(config.data) / NAME, _ways(config), config.length, recite=RECITE)
    check_out(out, config.model)  # training took long enough for something else to be put there
    _put(made, out.resolve(), f"\n{MEASURED}\n\n```\n{gap.text(lines)}\n```\n")
    return lines


def run_of(out: Path) -> Path:
    """The folder of an adapter's run."""
    out = out.resolve()
    return out.with_name(f"{out.name}.run")


def check_out(out: Path, model: str, documents: Path | None = None) -> None:
    """Raise TrainError unless `out` may become the adapter: a new or empty folder, or one with only an adapter of `tune`.

    It may not be the model, nor lie among the documents: the next run would read the adapter as one of them.
    """
    place = out.resolve()
    if documents is not None and documents.resolve() in (place, *place.parents):
        raise TrainError(f"{out} is the documents' folder or lies in it; give a folder outside {documents}")
    if place == Path(model).resolve():
        raise TrainError(f"{out} is the model to tune; give another folder")
    if place.exists() and not _replaceable(place):
        raise TrainError(f"{out} holds something other than an adapter that `kvgraph tune` made; give a new folder")


def _replaceable(place: Path) -> bool:
    """Whether something is an empty folder, or one with nothing but an adapter that `tune` made."""
    if not place.is_dir():
        return False
    names = {path.name for path in place.iterdir()}
    if not names <= {adapters.CONFIG, adapters.WEIGHTS, CARD}:
        return False
    return not names or (CARD in names and MEASURED in (place / CARD).read_text(encoding="utf-8", errors="replace"))


def _put(made: Path, out: Path, measured: str) -> None:
    """Write an adapter, with what was measured in its card, in place of what `out` holds, which stays until this is whole."""
    new, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    with io.errors_named(out, TrainError):
        try:
            shutil.copytree(made, new)
            with (new / CARD).open("a", encoding="utf-8") as card:
                card.write(measured)
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
                out.rename(old)
            new.rename(out)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _ways(config: Config) -> list[gap.Way]:
    tuned = config.stages[0].components[0]
    return [
        (spec, edges)
        for spec in tuned.methods
        for edges in (tuned.edges if methods.parse(spec).reads_edges else ("none",))
    ]


def measured(
    base: str,
    adapter: Path | None,
    folder: Path,
    ways: Sequence[gap.Way],
    length: int,
    *,
    recite: int = RECITE,
    examples: int = SCORED,
) -> list[gap.GapRow]:
    """The table of the methods' costs on held-out records, before and after an adapter (without one, both are before)."""
    loaded = models.load(base)
    trainable = models.trainable(loaded.hf.float())
    records = Records(folder, VALIDATION, loaded.tokenizer, recite=recite)
    module: Any = trainable.hf
    states: dict[str, Callable[[], AbstractContextManager[None]]] = {"before": nullcontext}
    if adapter is not None:
        from peft import PeftModel

        module = PeftModel.from_pretrained(trainable.hf, str(adapter))
        states = {"before": module.disable_adapter, "after": nullcontext}
    module.eval()

    def run(packed: Packed) -> Tensor:
        return logits(trainable, packed, module=module)

    numbers = range(min(examples, len(records)))
    with Progress("scoring", len(numbers)) as bar:
        rows: list[gap.Scored] = []
        for number in numbers:
            rows += gap.score(run, states, records, [number], ways, length)
            bar.advance(1)
    return gap.table(rows, "before", "after" if adapter is not None else "before")
