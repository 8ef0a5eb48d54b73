"""The configuration of a training run: one frozen value that describes it completely and is saved beside its result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from kvgraph.errors import KVGraphError

WHOLE, LINKS, LORA = TRAINED = ("all", "links", "lora")
NONE, SELECTIVE, FULL = CHECKPOINTING = ("none", "selective", "full")
COSINE, TRAPEZOID, CONSTANT = SCHEDULES = ("cosine", "trapezoid", "constant")
ADAMW, MUON = OPTIMIZERS = ("adamw", "muon")
FLOAT32, BFLOAT16 = PRECISIONS = ("float32", "bfloat16")
ANSWERS, DISTILL = OBJECTIVES = ("answers", "distill")
SDPA, FLEX = ATTENTIONS = ("sdpa", "flex")
OLD_NAMES = {"deepen": "stack"}  # in the config.json of older runs
STRICT = {"extra": "forbid"}  # pydantic refuses settings that don't exist


class TrainError(KVGraphError, ValueError):
    """A run can't start or continue: a setting, its data, or a checkpoint is wrong. The message says what to do."""


@dataclass(frozen=True)
class Component:
    """One kind of example in a mixture.

    source: the origin of its examples: "world:KIND,SETTINGS" (kvgraph.data.world), or a folder that `kvgraph data prepare`
        made, relative to the configuration's `data`.
    weight: how often it is drawn, relative to the other components.
    methods: as written on the command line. Each example is trained by one of them, drawn evenly, or by `every` one.
    edges: for methods that read edges: "links" (the data's own), a name that `kvgraph.edges.named_edges` knows, or "random"
        (as many edges as the data's own, between segments drawn for every example). One is drawn for each example.
    recite: the number of documents per example that are also asked for by title, to be quoted.
    through_links: questions see the link tokens and not the documents, so that all information has to pass through the
        links (gist masking: Mu et al. 2023, arXiv 2304.08467). For kvlink only.
    """

    name: str
    source: str
    methods: tuple[str, ...]
    weight: float = 1.0
    every: bool = False
    edges: tuple[str, ...] = ("links",)
    through_links: bool = False
    recite: int = 0
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.recite < 0:
            raise TrainError(f"component {self.name} has recite {self.recite}; it must be at least 0")
        if not self.methods or not self.edges:
            raise TrainError(f"component {self.name} needs at least one method and one kind of edges")
        if not self.weight > 0:
            raise TrainError(f"component {self.name} has weight {self.weight}; it must be above 0, or leave it out")


@dataclass(frozen=True)
class Stage:
    """A part of a run with one mixture. Its length is a number of optimizer steps, or of epochs over its components' data.

    A component with the same name as one in the previous stage continues where that one stopped in its data.
    """

    components: tuple[Component, ...]
    steps: int = 0
    epochs: float = 0.0
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.epochs > 0):
            raise TrainError("a stage has either steps or epochs, above 0")
        names = [component.name for component in self.components]
        if not names or len(set(names)) < len(names):
            raise TrainError(f"the components of a stage need different names; here they are {names}")


@dataclass(frozen=True)
class Config:
    """A training run. The types of the fields describe them, for the command line too.

    A step packs its examples into sequences, which run one by one (gradient accumulation), spread over the processes.
    """

    name: Annotated[str, "name of the recipe"]
    model: Annotated[str, 'folder or hub name to start from, or "world" for the new one of kvgraph.train.start']
    stages: tuple[Stage, ...]
    data: Annotated[str, "folder of the components' sources"] = ""
    limit: Annotated[int, "stop after this many of the planned optimizer steps; 0 for all"] = 0
    minutes: Annotated[float, "stop after this many minutes, with a schedule by time; 0 for all steps"] = 0.0
    batch: Annotated[int, "examples per optimizer step"] = 64
    length: Annotated[int, "maximum tokens of a sequence that examples are packed into"] = 4096
    objective: Annotated[str, "answers (given ones) or distill (the untuned model's under full; needs no labels)"] = (
        ANSWERS
    )
    hold: Annotated[
        float, "in a distillation, weight of keeping full unchanged, for components with the method full"
    ] = 0.25
    document_weight: Annotated[float, "weight of the documents' tokens in the loss; the answers' is 1"] = 0.0
    optimizer: Annotated[str, "muon for matrices and adamw for the rest, or adamw for all"] = ADAMW
    lr: Annotated[float, "peak learning rate"] = 5e-6
    matrix_lr: Annotated[float, "peak learning rate of the matrices, with optimizer muon"] = 0.0
    schedule: Annotated[str, "of the learning rate: cosine (to 0), trapezoid (to 0 at the end) or constant"] = COSINE
    warmup: Annotated[float, "share of the steps in which the learning rate rises from 0"] = 0.1
    decay: Annotated[float, "share of the steps in which a trapezoid falls to 0"] = 0.3
    betas: Annotated[tuple[float, float], "of AdamW"] = (0.9, 0.95)
    weight_decay: Annotated[float, "of matrices; norms, biases and embeddings have none"] = 0.0
    clip: Annotated[float, "maximum norm of the gradient; 0 for no limit"] = 1.0
    trained: Annotated[str, "all weights, the links' rows alone, or a lora adapter (saved merged)"] = WHOLE
    lora_rank: Annotated[int, "rank of the lora adapter"] = 16
    adapter: Annotated[str, "folder of a lora adapter to train further; a distillation's teacher uses it too"] = ""
    stack: Annotated[int, "number of last layers to copy on top before the first step (stacking)"] = 0
    links: Annotated[int, "new link tokens per document, for components with the method kvlink"] = 0
    slots: Annotated[int, "documents with new link tokens; new memory tokens are added too"] = 0
    precision: Annotated[str, "of the computation, bfloat16 or float32; weights are float32"] = BFLOAT16
    attention: Annotated[str, "sdpa (a mask for each example) or flex (FlexAttention, compiled for a GPU)"] = SDPA
    checkpointing: Annotated[str, "of activations, in none, every second (selective) or all (full) layers"] = NONE
    threads: Annotated[int, "CPU threads; 0 for torch's choice"] = 0
    workers: Annotated[int, "processes that lay out examples ahead of training; 0: the trainer does it itself"] = 1
    seed: Annotated[int, "of the data's order and of new weights"] = 0
    evaluate_every: Annotated[int, "steps between evaluations; the last is at the end"] = 500
    evaluation: Annotated[int, "validation examples per component and method; 0 to not evaluate"] = 64
    save_every: Annotated[int, "steps between checkpoints; the last is at the end"] = 500
    keep: Annotated[int, "number of checkpoints to keep, the latest ones"] = 2
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise TrainError(f"{name} is {getattr(self, name)!r}; there are {', '.join(known)}")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise TrainError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("lr", "matrix_lr", "weight_decay", "clip", "document_weight", "minutes", "hold"):
            if not math.isfinite(getattr(self, name)):
                raise TrainError(f"{name} is {getattr(self, name)}; it must be a finite number")
        if not self.lr > 0 or (self.optimizer == MUON and not self.matrix_lr > 0):
            raise TrainError("lr must be above 0, and with optimizer muon matrix_lr too")
        if not 0 <= self.warmup <= 1 or not 0 <= self.decay <= 1:
            raise TrainError("warmup and decay are shares of the steps, between 0 and 1")
        if self.objective == DISTILL and self.trained == WHOLE:
            raise TrainError(
                "a distillation's teacher is the model as it was: train a lora adapter or links, not all weights"
            )
        if self.objective == DISTILL and self.document_weight:
            raise TrainError("a distillation learns what follows the documents; leave document_weight out")
        if self.adapter and self.trained != LORA:
            raise TrainError("adapter is a lora adapter to train further; set trained to lora")
        if self.links and not self.slots:
            raise TrainError("links needs slots, the documents to give link tokens for")
        if not self.stages:
            raise TrainError("a run needs at least one stage")

    def to_json(self) -> str:
        """The whole configuration, for `from_json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The configuration that `to_json` wrote. Raises TrainError, naming the setting, for anything else."""
        from pydantic import TypeAdapter, ValidationError

        from kvgraph.data.schema import first_error

        wrong = "this isn't the configuration of a training run"
        try:
            given = json.loads(text)
            if isinstance(given, dict):
                given = {OLD_NAMES.get(name, name): value for name, value in given.items()}
            return TypeAdapter(cls).validate_python(given)
        except ValidationError as error:
            raise TrainError(f"{wrong}: {first_error(error)}") from None
        except ValueError as error:
            raise TrainError(f"{wrong}: it is not JSON: {error}") from None

    @classmethod
    def read(cls, path: str | Path) -> Config:
        """The configuration in a file."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "trained": TRAINED,
    "precision": PRECISIONS,
    "checkpointing": CHECKPOINTING,
    "objective": OBJECTIVES,
    "attention": ATTENTIONS,
}
_LEAST = {
    **dict.fromkeys(("batch", "length", "lora_rank", "evaluate_every", "save_every", "keep"), 1),
    **dict.fromkeys(
        (
            "limit",
            "minutes",
            "hold",
            "stack",
            "links",
            "slots",
            "threads",
            "workers",
            "evaluation",
            "document_weight",
            "weight_decay",
            "clip",
        ),
        0,
    ),
}
