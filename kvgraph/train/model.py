"""The model of a run: loaded or new, with link tokens and an adapter if configured, and its saved forms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from kvgraph import methods, models
from kvgraph.methods import Method
from kvgraph.models import Trainable
from kvgraph.models.fingerprint import state_hash
from kvgraph.models.loading import one_line
from kvgraph.train import start
from kvgraph.train.config import ANSWERS, DISTILL, FULL, LINKS, NONE, WHOLE, Config, Stage, TrainError
from kvgraph.train.links import add_link_tokens

STUDENT, TEACHER = "default", "teacher"  # peft's names of the adapter that is trained, and of the one that teaches
NEW, NEW_LINKS = "world", "kvlink"  # in a configuration: the new model, and the method that gets the new link tokens


@dataclass(frozen=True)
class Student:
    """A model to train.

    trainable: the model as training runs it.
    module: the holder of the parameters to train: the model itself, or the peft model around it.
    stages: the configuration's, with the new link tokens' ids in place of "kvlink".
    dtype: of the loaded and the saved model. While it is trained, it is float32.
    base: a hash of the weights as they were loaded.
    """

    trainable: Trainable
    module: nn.Module
    tokenizer: Any
    stages: tuple[Stage, ...]
    dtype: torch.dtype
    config: Config
    base: str

    @property
    def hf(self) -> Any:
        """The transformers model."""
        return self.trainable.hf

    @property
    def frozen(self) -> list[tuple[Tensor, Any]]:
        """Parameters with the part of each that isn't trained, for the new model of kvgraph.train.start."""
        started = (getattr(self.hf.config, "kvgraph", None) or {}).get("start")
        return start.frozen(self.hf) if started == NEW and self.config.trained == WHOLE else []

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """A block in which the model is a distillation's teacher: as it was before the first step."""
        module: Any = self.module
        if not self.config.adapter:
            with module.disable_adapter():
                yield
            return
        module.set_adapter(TEACHER)
        try:
            yield
        finally:
            module.set_adapter(STUDENT)

    @property
    def embeddings(self) -> Iterator[Tensor]:
        """Parameters whose rows stand for tokens."""
        for name, p in self.module.named_parameters():
            if "trainable_tokens" in name:
                yield p
        for layer in (self.hf.get_input_embeddings(), self.hf.get_output_embeddings()):
            yield from layer.parameters() if layer is not None else ()


def build(config: Config) -> Student:
    """The model as it is before the first step, on the CPU; the same every time.

    Raises ModelError if it can't be loaded, TrainError if the configuration doesn't fit it.
    """
    torch.manual_seed(config.seed)
    loaded = _started(config.seed) if config.model == NEW else models.load(config.model)
    base = state_hash(loaded.hf)
    hf, dtype = loaded.hf.float(), loaded.dtype
    if config.stack:
        models.stack(hf, config.stack)
    stages = config.stages
    if config.slots:
        stages = _with_links(stages, add_link_tokens(hf, config.links, config.slots))
    trained = [methods.parse(spec) for stage in stages for component in stage.components for spec in component.methods]
    declared = {
        "tuned_for": sorted({m.name for m in trained if m.needs_tuning}),
        "methods": sorted(set(_specs(stages))),
    }
    hf.config.kvgraph = (getattr(hf.config, "kvgraph", None) or {}) | declared
    trainable = models.trainable(hf)
    module = hf.train() if config.trained == WHOLE else _adapted(hf, config, trained)
    if config.checkpointing != NONE:
        hf.activation_checkpointing_enable(every_n_layers=1 if config.checkpointing == FULL else 2)
    return Student(trainable, module, loaded.tokenizer, stages, dtype, config, base)


def check(student: Student) -> None:
    """Before the first step, raise TrainError for methods that can't be trained, in general or with this model."""
    rows = student.hf.get_input_embeddings().weight.shape[0]
    for component in (component for stage in student.stages for component in stage.components):
        for spec in component.methods:
            method = methods.parse(spec)
            if method.own_tokens and method.own_tokens[-1] >= rows:
                raise TrainError(
                    f"{spec} has the token id {method.own_tokens[-1]:,}, but the model's vocabulary has {rows:,}"
                )
            if method.needs_probe or not method.trains_by_mask:
                raise TrainError(f"component {component.name} trains by {spec}, which no attention mask can express")
            if component.through_links and not method.link_tokens:
                raise TrainError(f"component {component.name} asks through link tokens, but {spec} has none")


def _started(seed: int) -> models.Model:
    """The new model, drawn with the seed. Its saved configuration records this, because some parts are never trained."""
    with TemporaryDirectory() as folder:
        start.write(folder, seed)
        made = models.load(folder)
    made.hf.config.kvgraph = {"start": NEW}
    made.hf.config.name_or_path = ""
    return made


def _specs(stages: tuple[Stage, ...]) -> Iterator[str]:
    return (spec for stage in stages for component in stage.components for spec in component.methods)


def _with_links(stages: tuple[Stage, ...], method: Method) -> tuple[Stage, ...]:
    """The stages with this method in place of "kvlink"."""
    spec = methods.format(method)
    if NEW_LINKS not in _specs(stages):
        raise TrainError('slots gives the model link tokens for the method "kvlink", but no component has it')
    return tuple(
        replace(stage, components=tuple(
            replace(component, methods=tuple(spec if m == NEW_LINKS else m for m in component.methods))
            for component in stage.components
        ))
        for stage in stages
    )  # fmt: skip


def _adapted(hf: Any, config: Config, trained: list[Method]) -> nn.Module:
    """A peft model around it that trains only the rows of the methods' own tokens, or a LoRA adapter and these rows, if any."""
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model

    rows = sorted({row for method in trained for row in method.own_tokens})
    if config.trained == LINKS:
        if not rows:
            raise TrainError(
                'trained is "links", but no component has a method with tokens of its own, such as kvlink with links'
            )
        return get_peft_model(hf, TrainableTokensConfig(token_indices=rows)).train()
    rank = config.lora_rank
    if config.adapter:
        return _went_on(hf, config)
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", trainable_token_indices=rows or None
    )
    return get_peft_model(hf, settings).train()


def _went_on(hf: Any, config: Config) -> nn.Module:
    """A peft model with two copies of the adapter that the configuration names: one is trained, the other may teach."""
    from peft import PeftModel

    with one_line(f"can't load the adapter {config.adapter}"):
        module = PeftModel.from_pretrained(hf, config.adapter, adapter_name=STUDENT, is_trainable=True)
        if config.objective == DISTILL:
            module.load_adapter(config.adapter, TEACHER)
    return module.train()


def save(student: Student, weights: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the model as an ordinary Hugging Face folder, with an adapter merged.

    weights: the trained weights of `student.module`, by name, on the CPU. dtype: of the files [default: the loaded model's].
    """
    dtype = dtype or student.dtype
    if student.config.trained == WHOLE:
        models.save(student.hf, folder, student.tokenizer, weights=weights, dtype=dtype)
        return
    fresh = build(student.config)  # merging and unmerging would change the weights that are trained further
    parameters = dict(fresh.module.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    merged: Any = fresh.module
    models.save(merged.merge_and_unload(adapter_names=[STUDENT]), folder, student.tokenizer, dtype=dtype)


def save_adapter(student: Student, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the trained weights of a LoRA adapter or of links as a PEFT folder, in the dtype of the loaded model, with a
    card that says how they were made.

    weights: as in `save`.
    """
    module: Any = student.module
    held = {name: weight.to(student.dtype) for name, weight in weights.items()}
    module.save_pretrained(folder, state_dict=held, selected_adapters=[STUDENT], save_embedding_layers=False)
    (folder / "README.md").write_text(_card(student), encoding="utf-8")


def _card(student: Student) -> str:
    """The model card of an adapter. Its front matter declares the methods it is tuned for, as JSON, which is valid YAML."""
    config, declared = student.config, student.hf.config.kvgraph
    front = {"base_model": config.model, "library_name": "peft", "kvgraph": declared}
    how = (
        "with gold answers"
        if config.objective == ANSWERS
        else "without labels, towards the model's own answers under full"
    )
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    specs = ", ".join(f"`{spec}`" for spec in declared["methods"])
    return f"---\n{lines}\n---\n\nTuned by `kvgraph train` ({config.name}) for {specs}, {how}.\n"
