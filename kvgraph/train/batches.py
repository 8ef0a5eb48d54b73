"""The steps of a run: examples drawn from the stage's mixture, laid out ahead of the training, and packed."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kvgraph import methods
from kvgraph.errors import KVGraphError
from kvgraph.train.config import DISTILL, Component, Config, Stage, TrainError
from kvgraph.train.distill import Lesson
from kvgraph.train.example import Example, join
from kvgraph.train.mixture import (
    ENDLESS,
    MISSES,
    VALIDATION,
    Drawn,
    Mixture,
    Source,
    nothing_fits,
    open_source,
    validation,
)
from kvgraph.train.pack import Packed, concatenated, first_fit

T = TypeVar("T")

CHUNK = 8  # examples that a worker lays out at a time
AHEAD = 4  # chunks laid out ahead by each worker


@dataclass(frozen=True)
class Cursor:
    """How far a run has come in its data: optimizer steps taken, and for each component the examples drawn and left out.

    Nothing else is needed to resume with the same data. seconds: that the run had taken when this was saved.
    """

    step: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Batch:
    """The sequences of one optimizer step. totals: tokens to learn in all of them, (of answers, of documents).

    progress: the run's progress after the step. lessons: for a distillation, one for each sequence; totals then count
    rows (of methods, of `full`).
    """

    progress: Cursor
    sequences: list[Packed]
    totals: tuple[int, int]
    examples: int
    lessons: list[Lesson] | None = None


class Planned(NamedTuple):
    """A stage with its open sources, for training and for evaluation, and its number of steps."""

    stage: Stage
    sources: list[Source]
    held_out: list[Source]
    steps: int

    @property
    def unseen(self) -> list[Component]:
        """Components without held-out examples."""
        return [c for c, source in zip(self.stage.components, self.held_out, strict=True) if not len(source)]


def plan(config: Config, stages: Iterable[Stage], tokenizer: Any, limit: int | None = None) -> list[Planned]:
    """The stages of a run, opened. An epoch has the number of steps that draws every example of the finite components once
    on average.

    limit: the number of positions of the model. Texts are cut to it too.
    """
    planned = []
    for stage in stages:
        sources = _sources(config, stage, tokenizer, "train", limit)
        finite = sum(len(source) for source in sources if len(source) < ENDLESS)
        steps = stage.steps or math.ceil(stage.epochs * finite / config.batch)
        if not steps:
            raise TrainError("a stage counts epochs, but none of its components has an end; give it steps")
        planned.append(Planned(stage, sources, _sources(config, stage, tokenizer, VALIDATION, limit), steps))
    return planned


def _sources(config: Config, stage: Stage, tokenizer: Any, split: str, limit: int | None) -> list[Source]:
    most = config.length if limit is None else min(config.length, limit)
    return [open_source(c, config.data, tokenizer, config.seed, split, _room(most, c)) for c in stage.components]


def _room(most: int, component: Component) -> int:
    """The maximum tokens of an example, such that a text cut to this length still fits with its methods' own tokens."""
    return most - max(len(method.own_tokens) for method in map(methods.parse, component.methods))


class ShippedExample(NamedTuple):
    """An example sent by a worker, as arrays: each tensor would take a shared file. held: laid out by `full`."""

    laid: dict[str, Any]
    taught: dict[str, Any] | None
    held: bool


class _Attempts(IterableDataset):
    """Chunks of a mixture's attempts, each (component, its examples). Workers take turns; together they yield all, in order.

    An error that a person can fix is the last item: raised in a worker process, it would lose its one line.
    """

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def __iter__(self) -> Iterator[list[tuple[int, list[ShippedExample]]] | KVGraphError]:
        worker = get_worker_info()
        mine, of = (worker.id, worker.num_workers) if worker else (0, 1)
        attempts = self.mixture.attempts()
        try:
            for number in itertools.count():
                chunk = list(itertools.islice(attempts, CHUNK))
                if number % of == mine:
                    yield [(one.component, [_sent(drawn) for drawn in self.mixture.made(one)]) for one in chunk]
        except KVGraphError as error:
            yield error


def _sent(drawn: Drawn) -> ShippedExample:
    full = not drawn.method.needs_tuning  # `full`: to be kept unchanged
    return ShippedExample(drawn.laid.arrays(), None if drawn.taught is None else drawn.taught.arrays(), full)


def ahead(config: Config, planned: list[Planned], progress: Cursor, limit: int, last: int) -> Iterator[Batch]:
    """The steps of a run after its progress, in order. Other processes lay out their examples while this one trains; a
    thread would delay every small operation.

    limit: the number of positions of the model. last: the last step to make. Raises KVGraphError if a step can't be made.
    """
    before = 0
    for stage in planned:
        first, end = max(before, progress.step) + 1, min(before + stage.steps, last)
        if first <= end:
            for step in itertools.islice(_steps(config, stage, progress, limit), end - first + 1):
                yield step
                progress = step.progress
        before += stage.steps


def _steps(config: Config, planned: Planned, progress: Cursor, limit: int) -> Iterator[Batch]:
    """The steps of a stage from here on, without end."""
    mixture = Mixture(
        planned.stage.components,
        planned.sources,
        config.seed,
        length=config.length,
        limit=limit,
        documents=config.document_weight > 0,
        distill=config.objective == DISTILL,
        counts=progress.drawn,
    )
    counts, left_out = dict(mixture.counts), mixture.left_out | dict(progress.left_out)
    names = [component.name for component in planned.stage.components]
    drawn: list[ShippedExample] = []
    examples, misses = 0, 0
    for component, made in _laid_out(mixture, config.workers):
        counts[names[component]] += 1
        if not made:
            left_out[names[component]] += 1
            misses += 1
            if misses == MISSES:
                raise nothing_fits(config.length, limit)
            continue
        drawn.extend(made)
        examples, misses = examples + 1, 0
        if examples == config.batch:
            progress = Cursor(progress.step + 1, dict(counts), dict(left_out))
            yield _packed(drawn, config.length, progress, examples)
            drawn, examples = [], 0


def _laid_out(mixture: Mixture, workers: int) -> Iterator[tuple[int, list[ShippedExample]]]:
    loader = DataLoader(
        _Attempts(mixture),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=_deaf,
        multiprocessing_context="fork" if workers else None,  # sources and tokenizers are inherited as they are
    )
    for chunk in loader:
        if isinstance(chunk, KVGraphError):
            raise chunk
        yield from chunk


def _packed(drawn: list[ShippedExample], length: int, progress: Cursor, examples: int) -> Batch:
    laid = [Packed.of(one.laid) for one in drawn]
    taught = [None if one.taught is None else Packed.of(one.taught) for one in drawn]
    groups = first_fit([max(len(x), len(y or ())) for x, y in zip(laid, taught, strict=True)], length)
    sequences = [concatenated([laid[i] for i in group]) for group in groups]
    lessons = (
        [_lesson(group, laid, taught, drawn) for group in groups] if any(one is not None for one in taught) else None
    )
    counted = [one.counts for one in lessons or sequences]
    methods, others = (sum(counts) for counts in zip(*counted, strict=True))
    return Batch(progress, sequences, (methods, others), examples, lessons)


def _lesson(
    group: list[int], laid: list[Packed], taught: Sequence[Packed | None], drawn: list[ShippedExample]
) -> Lesson:
    """The teacher's side of the sequence packed from these examples."""
    rows = torch.tensor([len(laid[i].rows) for i in group])
    held = torch.tensor([drawn[i].held for i in group]).repeat_interleave(rows)
    return Lesson(concatenated([one for i in group if (one := taught[i]) is not None]), held)


def _as_it_is(chunk: T) -> T:
    """Instead of torch's own, which makes tensors of arrays: each would take a shared file, and a worker that finds no room
    for one loses the chunk, for which the trainer would wait forever."""
    return chunk


def _deaf(worker: int) -> None:
    """In the worker: ignore signals. A terminal sends them to both processes, and the trainer reacts."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class ValidationSet:
    """The evaluation of a component by one method: sequences, and the number of targets of each answer in them."""

    name: str
    method: str
    sequences: list[Packed]
    answers: list[list[int]]


def validation_sets(config: Config, planned: Planned, limit: int) -> list[ValidationSet]:
    """The evaluation of a stage: for each component with held-out examples that fit, `config.evaluation` of them, by each
    of its methods.
    """
    held_out = dict(zip(planned.stage.components, planned.held_out, strict=True))
    components = [component for component in held_out if component not in planned.unseen]
    sources = [held_out[component] for component in components]
    of = [(c.name, spec) for c in components for spec in c.methods]
    found = validation(
        components, sources, config.seed, config.evaluation, length=config.length, limit=limit, documents=False
    )
    return [_validation_set(*names, drawn, config.length) for names, drawn in zip(of, found, strict=True) if drawn]


def _validation_set(name: str, method: str, drawn: list[Drawn], length: int) -> ValidationSet:
    """Examples packed in their order, so that every target of a sequence can be attributed to its answer."""
    chunks: list[list[Drawn]] = []
    for one in drawn:
        if not chunks or sum(len(d.laid) for d in chunks[-1]) + len(one.laid) > length:
            chunks.append([])
        chunks[-1].append(one)
    sequences = [concatenated([one.laid for one in chunk]) for chunk in chunks]
    return ValidationSet(name, method, sequences, [[n for one in chunk for n in _answers(one)] for chunk in chunks])


def _answers(drawn: Drawn) -> list[int]:
    """The number of targets of each answer of an example."""
    questions, graph = drawn.example.questions, drawn.example.graph
    counts = [sum(question.learned) if question.learned else len(question.answer) for question in questions]
    if sum(counts) != drawn.laid.counts[0]:  # the first token of an answer isn't learned if nothing precedes it
        counts = [len(join(Example(graph, [question]), drawn.method).answers) for question in questions]
    return [count for count in counts if count]
