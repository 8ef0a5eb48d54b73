"""Checkpoints: folders `step-000500` in a run's folder. Each is either complete or absent.

step-000500/model/         the model in Hugging Face's format, to be served
step-000500/adapter/       if the run trains one: the adapter by itself, in PEFT's format
step-000500/state/         weights and optimizer in float32, in torch.distributed.checkpoint's format
step-000500/progress.json  steps and seconds taken, examples drawn and left out
step-000500/config.json    the run's configuration
step-000500/origin.json    what the run started from: hashes of the model's weights and of its data, and the data's length
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Size, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from kvgraph.data import io
from kvgraph.train.batches import Cursor
from kvgraph.train.config import TrainError

MODEL, ADAPTER, STATE, PROGRESS, CONFIG = "model", "adapter", "state", "progress.json", "config.json"
ORIGIN = "origin.json"


def found(run: Path) -> list[Path]:
    """The complete checkpoints of a run, the latest last."""
    named = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))


@contextmanager
def writing(run: Path, step: int, keep: int, *, main: bool) -> Iterator[Path]:
    """A folder to write a checkpoint into. It gets its name once its contents are on the disk; then all but the latest
    `keep` checkpoints are deleted. If writing fails, nothing that was there before changes.

    main: whether this process creates, renames and deletes folders; the others wait for it.
    """
    place = run / f"step-{step:06d}"
    unfinished = run / f".{place.name}"
    if main:
        _delete(*run.glob(".step-*"))
        unfinished.mkdir(parents=True)
    _wait()
    try:
        yield unfinished
    except BaseException:
        if main:
            _delete(unfinished)  # the disk may be full
        raise
    _wait()
    if main:
        _to_disk(unfinished)
        unfinished.rename(place)
        _to_disk(run, deep=False)
        for old in found(run)[:-keep]:
            gone = old.rename(run / f".{old.name}")  # a folder that is half deleted mustn't look like a checkpoint
            _delete(gone)
    _wait()


def save_state(folder: Path, module: nn.Module, optimizers: list[Optimizer], progress: Cursor, *, main: bool) -> None:
    """Write the state that the next step depends on; every process writes its part."""
    with _alone_or_not() as alone:
        dcp.save(_tensors(module, optimizers)[0], checkpoint_id=folder / STATE, no_dist=alone)
    if main:
        io.write_json(folder / PROGRESS, asdict(progress))


def load_state(folder: Path, module: nn.Module, optimizers: list[Optimizer]) -> Cursor:
    """Read the state that `save_state` wrote, by any number of processes."""
    tensors, states = _tensors(module, optimizers)
    read_tensors(folder / STATE, tensors)
    set_optimizer_state_dict(module, optimizers, states)
    try:
        return Cursor(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrainError(
            f"{folder / PROGRESS} can't be read: {error}; delete {folder} to go on from the one before"
        ) from None


def save_origin(folder: Path, base: str, data: Mapping[str, int], hashes: Mapping[str, str]) -> None:
    """Write what a run started from: a hash of the model's weights, and the number of examples of each component, with a
    hash of them where they are in a file.
    """
    io.write_json(folder / ORIGIN, {"base": base, "data": dict(data), "hashes": dict(hashes)})


def has_base(folder: Path) -> bool:
    """Whether a checkpoint can tell if a model is the one its run started from, even after that model has been moved."""
    return bool(_origin(folder).get("base"))


def check_base(folder: Path, base: str) -> None:
    """Raise TrainError if a model's weights aren't those that the run of a checkpoint started from."""
    if _origin(folder).get("base", base) != base:
        raise TrainError(
            f"{folder} was trained from a model with other weights than the one given; give that one with --model"
        )


def check_data(folder: Path, data: Mapping[str, int], hashes: Mapping[str, str]) -> None:
    """Raise TrainError if a component has more, fewer or other examples than at the start of a checkpoint's run."""
    origin = _origin(folder)
    for name, count in origin.get("data", {}).items():
        if name in data and data[name] != count:
            raise TrainError(
                f"{name} had {count:,} examples when the run began, and has {data[name]:,} now, so its order and the "
                "learning rate would be others; put the data back as they were, or start a new run"
            )
    for name, before in origin.get("hashes", {}).items():  # older checkpoints have none
        if hashes.get(name, before) != before:
            raise TrainError(
                f"{name} has other examples than when the run began, as many as then; put the data back as they were, or "
                "start a new run"
            )


def _origin(folder: Path) -> dict[str, Any]:
    """The contents that `save_origin` wrote; empty for checkpoints older than that function."""
    try:
        return dict(json.loads((folder / ORIGIN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise TrainError(
            f"{folder / ORIGIN} can't be read: {error}; delete {folder} to go on from the one before"
        ) from None


def _tensors(module: nn.Module, optimizers: list[Optimizer]) -> tuple[dict[str, Any], Any]:
    """(the state to save, or to load in place; the optimizers' states within it)."""
    states = get_optimizer_state_dict(module, optimizers)
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {"weights": weights, "optimizer": states["state"]}, states


def sizes(folder: Path) -> dict[str, Size]:
    """The shapes of the tensors in a torch.distributed.checkpoint folder, by their keys."""
    try:
        index = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except (Exception, CheckpointException) as error:  # the second is no Exception
        raise TrainError(f"{folder} can't be read: {reason(error)}; is it complete?") from None
    return {key: value.size for key, value in index.items() if isinstance(value, TensorStorageMetadata)}


def read_tensors(folder: Path, wanted: dict[str, Any]) -> None:
    """Read tensors of a torch.distributed.checkpoint folder into these, in place; raises TrainError if it's damaged."""
    try:
        with _alone_or_not() as alone:
            dcp.load(wanted, checkpoint_id=folder, no_dist=alone)
    except (Exception, CheckpointException) as error:
        raise TrainError(f"{folder} can't be read: {reason(error)}; delete what is damaged") from None


def reason(error: BaseException) -> str:
    """What went wrong, in one line: that of the operating system if it was that."""
    found = list(_behind(error))
    for one in found:
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
    return (str(found[-1]).strip().splitlines() or [type(found[-1]).__name__])[0]


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it: torch.distributed.checkpoint wraps some, and others arise while files are closed."""
    while error is not None:
        yield error
        failures = getattr(error, "failures", None)
        error = next(iter(failures.values()))[0] if failures else error.__cause__ or error.__context__


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Whether this process is the only one, which PyTorch needn't warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        yield not distributed.is_initialized()


def _wait() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def _delete(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _to_disk(folder: Path, *, deep: bool = True) -> None:
    """Wait until a folder is on the disk; with deep, also everything in it."""
    for path in (*(folder.rglob("*") if deep else ()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
