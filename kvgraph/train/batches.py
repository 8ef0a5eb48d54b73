"""The steps of a run: examples drawn from the stage's mixture and packed, prepared ahead of the training."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from kvgraph import methods
from kvgraph.errors import KVGraphError
from kvgraph.train.config import Component, Config, Stage, TrainError
from kvgraph.train.example import Example, join
from kvgraph.train.mixture import ENDLESS, VALIDATION, Drawn, Mixture, Source, open_source, validation
from kvgraph.train.pack import Packed, first_fit

AHEAD = 4  # steps prepared ahead


@dataclass(frozen=True)
class Cursor:
    """How far a run's data is: optimizer steps taken, examples drawn of each component and left out of them.

    Nothing else is needed to go on with the same data.
    """

    step: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The sequences of one optimizer step. totals: tokens to learn in all of them, (of answers, of documents).

    progress: that of the run when the step is done.
    """

    progress: Cursor
    sequences: list[Packed]
    totals: tuple[int, int]
    examples: int


class Planned(NamedTuple):
    """A stage with its sources open, to train on and to evaluate with, and how many steps it takes."""

    stage: Stage
    sources: list[Source]
    held_out: list[Source]
    steps: int

    @property
    def unseen(self) -> list[Component]:
        """Components without held-out examples."""
        return [c for c, source in zip(self.stage.components, self.held_out, strict=True) if not len(source)]


def plan(config: Config, stages: Iterable[Stage], tokenizer: Any) -> list[Planned]:
    """The stages of a run, opened. An epoch is as many steps as take every example of its finite components once, on average."""
    planned = []
    for stage in stages:
        sources = _sources(config, stage, tokenizer, "train")
        finite = sum(len(source) for source in sources if len(source) < ENDLESS)
        steps = stage.steps or math.ceil(stage.epochs * finite / config.batch)
        if not steps:
            raise TrainError("a stage counts epochs, but none of its components has an end; give it steps")
        planned.append(Planned(stage, sources, _sources(config, stage, tokenizer, VALIDATION), steps))
    return planned


def _sources(config: Config, stage: Stage, tokenizer: Any, split: str) -> list[Source]:
    return [open_source(c, config.data, tokenizer, config.seed, split, _room(config, c)) for c in stage.components]


def _room(config: Config, component: Component) -> int:
    """Tokens that an example may have, so that a text that is cut still fits with its methods' own tokens."""
    return config.length - max(len(method.own_tokens) for method in map(methods.parse, component.methods))


class Batches(IterableDataset):
    """The steps of a run that come after its progress, in order.

    limit: positions that the model has. last: the step to end with. An error that a person can mend is the last item:
    it would lose its one line on its way out of a worker process.
    """

    def __init__(self, config: Config, planned: list[Planned], progress: Cursor, limit: int, last: int):
        self.config, self.planned, self.progress, self.limit, self.last = config, planned, progress, limit, last

    def __iter__(self) -> Iterator[Batch | KVGraphError]:
        try:
            yield from self._steps()
        except KVGraphError as error:
            yield error

    def _steps(self) -> Iterator[Batch]:
        config, progress, before = self.config, self.progress, 0
        for planned in self.planned:
            mixture = Mixture(
                planned.stage.components,
                planned.sources,
                config.seed,
                length=config.length,
                limit=self.limit,
                documents=config.document_weight > 0,
                counts=progress.drawn,
            )
            mixture.left_out |= progress.left_out
            for number in range(max(before, progress.step) + 1, min(before + planned.steps, self.last) + 1):
                drawn = [one for _ in range(config.batch) for one in mixture.draw()]
                progress = Cursor(number, dict(mixture.counts), dict(mixture.left_out))
                yield _packed(drawn, config.length, progress, config.batch)
            before += planned.steps


def _packed(drawn: list[Drawn], length: int, progress: Cursor, examples: int) -> Batch:
    sequences = first_fit((one.laid for one in drawn), length)
    answers, documents = (sum(counts) for counts in zip(*(packed.counts for packed in sequences), strict=True))
    return Batch(progress, sequences, (answers, documents), examples)


def ahead(steps: Batches) -> Iterator[Batch]:
    """The same steps, prepared by another process while this one trains: a thread would hold up every small operation.

    Raises KVGraphError where a step can't be made.
    """
    loader = DataLoader(
        steps,
        batch_size=None,
        num_workers=1,
        prefetch_factor=AHEAD,
        worker_init_fn=_deaf,
        multiprocessing_context="fork",  # sources and tokenizers go over as they are
    )
    for step in loader:
        if isinstance(step, KVGraphError):
            raise step
        yield step


def _deaf(worker: int) -> None:
    """In the worker: leave it to the trainer to react to signals, which a terminal sends to both."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class ValidationSet:
    """What a component is evaluated with by one method: sequences, and how many targets each answer in them has."""

    name: str
    method: str
    sequences: list[Packed]
    answers: list[list[int]]


def validation_sets(config: Config, planned: Planned, limit: int) -> list[ValidationSet]:
    """The evaluation of a stage: `config.evaluation` held-out examples of each component that has some, by each of its
    methods.
    """
    held_out = dict(zip(planned.stage.components, planned.held_out, strict=True))
    components = [component for component in held_out if component not in planned.unseen]
    sources = [held_out[component] for component in components]
    of = [(c.name, spec) for c in components for spec in c.methods]
    found = validation(
        components, sources, config.seed, config.evaluation, length=config.length, limit=limit, documents=False
    )
    return [_validation_set(*names, drawn, config.length) for names, drawn in zip(of, found, strict=True)]


def _validation_set(name: str, method: str, drawn: list[Drawn], length: int) -> ValidationSet:
    """Examples packed in their order, so that it is known whose answers the targets of a sequence are."""
    chunks: list[list[Drawn]] = []
    for one in drawn:
        if not chunks or sum(len(d.laid) for d in chunks[-1]) + len(one.laid) > length:
            chunks.append([])
        chunks[-1].append(one)
    sequences = [first_fit((one.laid for one in chunk), length)[0] for chunk in chunks]
    return ValidationSet(name, method, sequences, [[n for one in chunk for n in _answers(one)] for chunk in chunks])


def _answers(drawn: Drawn) -> list[int]:
    """How many targets each answer of an example has."""
    questions, graph = drawn.example.questions, drawn.example.graph
    counts = [sum(question.learned) if question.learned else len(question.answer) for question in questions]
    if sum(counts) != drawn.laid.counts[0]:  # the first token of an answer isn't learned where nothing stands before it
        counts = [len(join(Example(graph, [question]), drawn.method).answers) for question in questions]
    return [count for count in counts if count]
