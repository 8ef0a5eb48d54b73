"""The training loop: `train` runs a configuration, in one process or in those that torchrun started.

A step draws examples, packs them into sequences, and runs these one by one. Its loss is divided by the number of tokens to
learn in the whole step, so neither the packing nor the number of processes changes it.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from kvgraph.data import io
from kvgraph.models.fingerprint import file_hash
from kvgraph.train import batches, checkpoint, distill, log, model, optim, parallel
from kvgraph.train.batches import Batch, Cursor, Planned, ValidationSet
from kvgraph.train.config import FLEX, MUON, WHOLE, Config, TrainError
from kvgraph.train.forward import logits, loss
from kvgraph.train.log import Log
from kvgraph.train.pack import Packed, moved
from kvgraph.train.records import Records

LOG_EVERY = 10  # steps between reading losses, which on a GPU waits for the device
MAY_CHANGE = {
    "limit",
    "minutes",
    "data",
    "threads",
    "workers",
    "evaluate_every",
    "evaluation",
    "save_every",
    "keep",
}  # when a run goes on


class TrainResult(NamedTuple):
    """How a run ended. step: the last one taken. checkpoint: the latest. signal: the one that stopped it early, if any."""

    step: int
    checkpoint: Path
    signal: signal.Signals | None


def train(config: Config, out: str | Path, *, resume: bool = True, wandb: bool = False) -> TrainResult:
    """Train a model; the run's folder `out` gets its configuration, log and checkpoints.

    If there are checkpoints of the same run already, it resumes from the latest, with the same data and losses. SIGTERM or
    Ctrl-C ends it after the current step, with a checkpoint. resume: False refuses to resume. wandb: log to Weights & Biases
    instead of TensorBoard.
    Raises TrainError, ModelError or GraphError if a setting, the data, memory or the disk don't allow it.
    """
    if not config.model:
        raise TrainError(f"{config.name} starts from another model; give it with --model")
    first = os.environ.get("RANK", "0") == "0"
    with (
        _explained(config, Path(out)),
        _without_denormals(),
        io.locked(Path(out), TrainError) if first else nullcontext(),
    ):
        trainer = Trainer(config, Path(out), resume, wandb)
        try:
            return trainer.run()
        finally:
            trainer.log.close()


@contextmanager
def _without_denormals() -> Iterator[None]:
    """A block in which denormal numbers are zero: sharp attention makes many, and they are slow on CPUs."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


class Trainer:
    """A run: model, optimizers, data and progress."""

    def __init__(self, config: Config, out: Path, resume: bool, wandb: bool):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the process that prepares steps is forked
        if config.threads:
            torch.set_num_threads(config.threads)
        before = _may_go_on(config, out, resume)
        self.config, self.out = config, out
        tracker = "wandb" if wandb else "tensorboard"
        self.accelerator = parallel.processes(config.precision, tracker, out)
        self.main, self.rank, self.count = (
            self.accelerator.is_main_process, self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip
        if config.optimizer == MUON and self.count > 1:
            raise TrainError(
                "muon needs whole matrices, which several processes share out; train in one, or with adamw"
            )
        self.flex = config.attention == FLEX
        self.student = model.build(config)
        model.check(self.student)
        if before is not None:
            checkpoint.check_base(before, self.student.base)
        self.module = self.student.module
        if self.count > 1:
            parallel.shard(self.module, self.student.hf.get_decoder().layers)
        else:
            self.module.to(self.accelerator.device)
        frozen = self.student.frozen
        self.masks = [(p, parallel.like(_without(p, part), p)) for p, part in frozen]
        self.optimizers = optim.optimizers(config, self.module, self.student.embeddings, [p for p, _ in frozen])
        self.progress = Cursor()
        if before is not None:
            self.progress = checkpoint.load_state(before, self.module, self.optimizers)
        self.planned = batches.plan(config, self.student.stages, self.student.tokenizer, self.student.trainable.limit)
        self.data = {c.name: len(s) for p in self.planned for c, s in zip(p.stage.components, p.sources, strict=True)}
        self.hashes = _hashes(self.planned)
        if before is not None:
            checkpoint.check_data(before, self.data, self.hashes)
        self.total = sum(planned.steps for planned in self.planned)
        self.last = min(self.total, config.limit or self.total)
        self.validation_sets: list[list[ValidationSet]] = []
        self.pending: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        self.saved = before
        self.began = time.monotonic() - self.progress.seconds  # as if the run had never stopped
        if before is not None and self._spent() >= 1:
            self.last = self.progress.step  # there is no time for another
        if self.main:
            out.mkdir(parents=True, exist_ok=True)
            io.write(out / checkpoint.CONFIG, config.to_json())
            name = "kvgraph" if wandb else tracker  # W&B's project, TensorBoard's folder
            self.accelerator.init_trackers(name, {"configuration": config.to_json()})
        self.log = Log(out, self.accelerator, self.progress.step, self.last)

    def run(self) -> TrainResult:
        """Train to the last step, until the time is over, or until a signal comes."""
        if self.progress.step:
            self.log.say(f"resuming after step {self.progress.step:,} of {self.last:,}")
        for name in {c.name: 0 for planned in self.planned for c in planned.unseen}:
            self.log.say(f"{name} has no validation examples, so it isn't evaluated")
        self._prepare_validation()
        if self.progress.step and self._evaluates() and self._agreed(self.main and not self.log.has_evaluation):
            self._evaluate()  # the run was killed between its checkpoint and the end of this evaluation
        with _Signals() as signals:
            began = time.perf_counter()
            for step in self._steps():
                value, norm = self._step(step)
                self.progress = step.progress
                self.pending.append((self._row(step, time.perf_counter() - began), value, norm))
                if self._look_after(signals.received is not None):
                    break
                began = time.perf_counter()
        if missing := sum(self.progress.left_out.values()):
            told = ", ".join(f"{name} {count:,}" for name, count in self.progress.left_out.items() if count)
            self.log.say(f"{missing:,} examples didn't fit {self.config.length:,} tokens, or their method: {told}")
        assert self.saved is not None
        stopped = signals.received if self.progress.step < self.last else None
        return TrainResult(self.progress.step, self.saved, stopped)

    def _look_after(self, stopping: bool) -> bool:
        """Log, evaluate and save after a step, as far as they are due. Returns whether it was the last step."""
        config, step = self.config, self.progress.step
        last = step == self.last or self._spent() >= 1
        ends = self._agreed(stopping) or last
        evaluates, saves = last or self._evaluates(), step % config.save_every == 0 or ends
        if step % LOG_EVERY == 0 or evaluates or saves:
            self._flush()
        if saves:
            self._save()
        if evaluates:  # after saving, so that a failure here loses nothing
            self._evaluate()
        return ends

    def _evaluates(self) -> bool:
        """Whether the run evaluates after the latest step."""
        return self.progress.step % self.config.evaluate_every == 0 or self.progress.step == self.last

    def _steps(self) -> Iterator[Batch]:
        return batches.ahead(self.config, self.planned, self.progress, self.student.trainable.limit, self.last)

    def _step(self, step: Batch) -> tuple[Tensor, Tensor]:
        """Take an optimizer step. Returns this process's part of the loss, and the gradient's norm."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        shares = list(self._share(step.sequences))
        total = torch.zeros((), device=self.accelerator.device)
        for i, (number, packed, weight) in enumerate(shares):
            parallel.synchronize(self.module, i == len(shares) - 1)
            torch.manual_seed(hash((self.config.seed, step.progress.step, number)))  # dropout, where a model has some
            value = self._loss(step, number, packed)
            (value * weight).backward()
            total += value.detach() * weight
        for p, mask in self.masks:
            if p.grad is not None:
                p.grad.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf)
        optim.set_rate(self.optimizers, self._rate(step.progress.step))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return total, parallel.whole(norm)

    def _share(self, sequences: list[Packed]) -> Iterator[tuple[int, Packed, float]]:
        """This process's sequences as (number, sequence, weight 1), on its device. All processes get the same number, since
        they run a sharded model together; the first sequence, with weight 0, fills up.
        """
        for first in range(0, len(sequences), self.count):
            mine = first + self.rank
            number, weight = (mine, 1.0) if mine < len(sequences) else (0, 0.0)
            yield number, self._placed(sequences[number]), weight

    def _placed(self, packed: Packed) -> Packed:
        """The sequence on this process's device; padded to one length if kernels are compiled for it."""
        placed = packed.to(self.accelerator.device)
        return placed.padded(self.config.length) if self.flex and placed.tokens.is_cuda else placed

    def _loss(self, step: Batch, number: int, packed: Packed) -> Tensor:
        """The part of sequence number `number` in the step's loss."""
        config = self.config
        if step.lessons is None:
            return loss(self._logits(packed), packed, document_weight=config.document_weight, totals=step.totals)
        lesson = step.lessons[number]
        with torch.no_grad(), self.student.teaching():
            taught = self._logits(self._placed(lesson.taught))
        held = moved(lesson.held, packed.tokens.device)
        return distill.loss(self._logits(packed), taught, held, hold=config.hold, totals=step.totals)

    def _rate(self, step: int) -> float:
        """The share of the peak learning rate: by steps, or by time if that ends the run first."""
        return optim.share(self.config, max(step, min(math.ceil(self._spent() * self.total), self.total)), self.total)

    def _spent(self) -> float:
        """The elapsed share of the time."""
        if not self.config.minutes:
            return 0.0
        return self._seconds() / (60 * self.config.minutes)

    def _seconds(self) -> float:
        """The time that the run has taken, the same in all processes."""
        taken = time.monotonic() - self.began
        return taken if self.count == 1 else float(self._sum(torch.tensor(taken))) / self.count

    def _logits(self, packed: Packed) -> Tensor:
        with self.accelerator.autocast():
            return logits(self.student.trainable, packed, module=self.module, flex=self.flex)

    def _agreed(self, wanted: bool) -> bool:
        """Whether any process wants something that all have to do together, such as to end after the same step."""
        if self.count == 1:
            return wanted
        return bool(self._sum(torch.tensor(float(wanted))) > 0)

    def _sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over processes."""
        found: Any = self.accelerator.reduce(value.to(self.accelerator.device), "sum")
        return found

    # -- output of a run -------------------------------------------------------------------------------------------

    def _row(self, step: Batch, seconds: float) -> dict[str, Any]:
        return {
            "step": step.progress.step,
            "lr": self.config.lr * self._rate(step.progress.step),
            "tokens": sum(map(len, step.sequences)),
            "sequences": len(step.sequences),
            "examples": step.examples,
            "seconds": seconds,
            "drawn": step.progress.drawn,
            "left_out": step.progress.left_out,
        }

    def _flush(self) -> None:
        """Log the steps since the last time."""
        if not self.pending:
            return
        rows, losses, norms = zip(*self.pending, strict=True)
        self.pending = []
        began = time.perf_counter()
        found = zip(rows, self._sum(torch.stack(losses)).tolist(), torch.stack(norms).tolist(), strict=True)
        rows[-1]["seconds"] += time.perf_counter() - began  # the GPU was still working on it
        logged = [{"step": row["step"], "loss": value, "gradient_norm": norm} | row for row, value, norm in found]
        self.log.steps(logged)
        for row in logged:
            if not math.isfinite(row["loss"]) or not math.isfinite(row["gradient_norm"]):
                raise TrainError(
                    f"the loss of step {row['step']:,} is {row['loss']}, the gradient's norm {row['gradient_norm']}; "
                    "lower lr, or lengthen warmup, in a new run"
                )

    def _evaluate(self) -> None:
        """Log how well each method answers the components of this stage."""
        if not self.config.evaluation:
            return
        at = itertools.accumulate(planned.steps for planned in self.planned)
        sets = next(v for v, end in zip(self.validation_sets, at, strict=True) if self.progress.step <= end)
        self.module.eval()
        self.log.evaluated([self._taken(one) for one in sets])
        self.module.train()
        parallel.release(self.module)

    def _prepare_validation(self) -> None:
        """Lay out the evaluation of each stage, and name the components without one."""
        if not self.config.evaluation:
            return
        limit = self.student.trainable.limit
        self.validation_sets = [batches.validation_sets(self.config, planned, limit) for planned in self.planned]
        for planned, sets in zip(self.planned, self.validation_sets, strict=True):
            there = {(one.name, one.method) for one in sets}
            for c in planned.stage.components:
                for spec in c.methods:
                    if c not in planned.unseen and (c.name, spec) not in there:
                        self.log.say(f"no validation example of {c.name} fits {spec}, so it isn't evaluated")

    @torch.no_grad()
    def _taken(self, validation_set: ValidationSet) -> dict[str, Any]:
        """The row of one component and method: loss per token, and the share of answers that greedy decoding would give."""
        sums = torch.zeros(4, dtype=torch.float64)  # loss, tokens, exact answers, answers
        for number, packed, weight in self._share(validation_set.sequences):
            found = self._logits(packed)
            value = loss(found, packed).double().cpu() * len(packed.targets)
            right = (found.argmax(-1) == packed.targets).cpu().split(validation_set.answers[number])
            exact = sum(bool(answer.all()) for answer in right)
            sums += weight * torch.stack([value, *map(torch.tensor, (len(packed.targets), exact, len(right)))])
        value, tokens, exact, answers = self._sum(sums).tolist()
        row = {"step": self.progress.step, "component": validation_set.name, "method": validation_set.method}
        return row | {"loss": value / tokens, "exact": exact / answers, "answers": int(answers)}

    def _save(self) -> None:
        """Write a checkpoint."""
        self.log.to_disk()
        with checkpoint.writing(self.out, self.progress.step, self.config.keep, main=self.main) as folder:
            progress = replace(self.progress, seconds=self._seconds())
            checkpoint.save_state(folder, self.module, self.optimizers, progress, main=self.main)
            weights = self._weights()
            if self.main:
                model.save(self.student, weights, folder / checkpoint.MODEL)
                if self.config.trained != WHOLE:
                    model.save_adapter(self.student, weights, folder / checkpoint.ADAPTER)
                io.write(folder / checkpoint.CONFIG, self.config.to_json())
                checkpoint.save_origin(folder, self.student.base, self.data, self.hashes)
        self.saved = checkpoint.found(self.out)[-1]

    def _weights(self) -> dict[str, Tensor]:
        """The trained weights, whole and on the CPU, in the first process."""
        found = {}
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                weight = parallel.whole(p.detach())
                if self.main:
                    found[name] = weight.cpu()
                    if not bool(torch.isfinite(found[name]).all()):
                        raise TrainError(
                            f"after step {self.progress.step:,} {name} isn't finite any more; lower lr, or lengthen warmup, "
                            "in a new run"
                        )
        return found


def _hashes(planned: list[Planned]) -> dict[str, str]:
    """A hash of the file of each component that has one. That of a large file is remembered until the file changes."""
    named = [(c.name, s) for p in planned for c, s in zip(p.stage.components, p.sources, strict=True)]
    return {name: file_hash(source.path) for name, source in named if isinstance(source, Records)}


def _without(parameter: Tensor, part: Any) -> Tensor:
    """Ones in the parameter's shape, with zeros in a part of it."""
    mask = torch.ones(parameter.shape)
    mask[part] = 0.0
    return mask


def _may_go_on(config: Config, out: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, if there is one. Raises TrainError if the folder is of another run, or of something else."""
    found = checkpoint.found(out)
    if not found:
        if not _is_free(out):
            raise TrainError(f"{out} holds a {checkpoint.CONFIG} or {log.FILE} of something else; give another folder")
        return None
    if not resume:
        raise TrainError(f"{out} holds a run already, {found[-1].name}; give another folder")
    before = Config.read(found[-1] / checkpoint.CONFIG)
    for field in fields(Config):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if (
            field.name not in MAY_CHANGE
            and old != new
            and not (field.name == "model" and checkpoint.has_base(found[-1]))
        ):
            what = f"{field.name} {old} there, {new} here" if field.name != "stages" else "its stages differ"
            raise TrainError(f"{out} holds another run ({what}); give another folder, or --resume {out} to continue it")
    return found[-1]


def _is_free(out: Path) -> bool:
    """Whether a folder without checkpoints has no file that a run's own would replace, such as a model's configuration."""
    try:
        Config.read(out / checkpoint.CONFIG)  # of a run that was stopped before its first checkpoint
    except FileNotFoundError:
        return not (out / log.FILE).exists()
    except (TrainError, ValueError):
        return False
    return True


class _Signals:
    """A block in which the first SIGTERM or SIGINT is only noted; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


@contextmanager
def _explained(config: Config, out: Path) -> Iterator[None]:
    """A block whose errors of memory and disk become one line that says what to do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _no_memory(error):
            raise
        raise TrainError(
            f"out of memory; lower length ({config.length:,}), use checkpointing=full ({config.checkpointing} now), train "
            f"an adapter (--trained lora) or with more processes. {_left(out)}"
        ) from None
    except (OSError, SafetensorError, CheckpointException) as error:
        if not _is_full(error) and not isinstance(error, CheckpointException):
            raise
        raise TrainError(
            f"{out} can't be written: {checkpoint.reason(error)}; free some space or keep fewer checkpoints (--keep "
            f"{config.keep} now). {_left(out)}"
        ) from None


def _no_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: PyTorch's allocators raise various errors, and the system kills the process that prepares steps."""
    told = ("allocate memory", "killed by signal: Killed")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)


def _is_full(error: BaseException) -> bool:
    reason = checkpoint.reason(error)
    return any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def _left(out: Path) -> str:
    """A sentence that names the checkpoint to resume from, if there is one."""
    found = checkpoint.found(out)
    return f"{found[-1]} is complete; the same command resumes from it" if found else "No checkpoint was written yet"
