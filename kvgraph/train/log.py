"""The output of a run while it trains: log.jsonl for programs, TensorBoard or W&B for curves, and a bar for people."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kvgraph.data import io
from kvgraph.progress import Progress

FILE = "log.jsonl"


class Log:
    """The log of one run. In all processes but the first it does nothing.

    step: the step that the run resumes from. Lines of later steps are dropped, since those steps run again.
    has_evaluation: whether an evaluation after this step was logged.
    """

    has_evaluation = False

    def __init__(self, folder: Path, accelerator: Accelerator, step: int, last: int):
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        if not self.main:
            return
        self.path = folder / FILE
        kept = _keep_until(self.path, step)
        self.has_evaluation = any(row["step"] == step and "component" in row for row in kept)
        self.file = self.path.open("a", encoding="utf-8")
        self.bar = Progress("training", last, done=step)
        self.bar.start()

    def steps(self, rows: list[dict[str, Any]]) -> None:
        """Log the rows of consecutive steps; trackers get their mean."""
        if not self.main or not rows:
            return
        self._write(rows)
        last, seconds = rows[-1], sum(row["seconds"] for row in rows)
        loss = sum(row["loss"] for row in rows) / len(rows)
        speed = sum(row["tokens"] for row in rows) / seconds
        curves = {"loss": loss, "lr": last["lr"], "gradient_norm": last["gradient_norm"], "tokens_per_second": speed}
        curves |= {"examples_per_second": sum(row["examples"] for row in rows) / seconds}
        curves |= {f"drawn/{name}": count for name, count in last["drawn"].items()}
        self._track(curves, last["step"])
        now = f"loss {loss:.4f}  lr {last['lr']:.2g}  {speed:,.0f} tokens/s"
        self.bar.show(last["step"], note=now)

    def evaluated(self, rows: list[dict[str, Any]]) -> None:
        """Log an evaluation: a row for each component and method."""
        if not self.main or not rows:
            return
        self._write(rows)
        names = [f"{row['component']}/{row['method']}" for row in rows]
        curves = {f"{name}/{k}": row[k] for name, row in zip(names, rows, strict=True) for k in ("loss", "exact")}
        self._track(curves, rows[0]["step"])
        width = max(map(len, names))
        for name, row in zip(names, rows, strict=True):
            self.say(f"step {row['step']:,}  {name:<{width}}  loss {row['loss']:.4f}  exact {row['exact']:6.1%}")

    def say(self, text: str) -> None:
        """Print a message for people."""
        if self.main:
            self.bar.say(text)

    def to_disk(self) -> None:
        """Wait until the log is on the disk."""
        if self.main:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the bar, the file and the trackers."""
        if self.main:
            self.bar.stop()
            self.file.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()

    def _track(self, curves: Mapping[str, float], step: int) -> None:
        self.accelerator.log(dict(curves), step=step)


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop a log's lines of later steps, and an incomplete last line. Returns the rows that stay."""
    if not path.exists():
        return []
    kept, rows = [], []
    for line in io.whole_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= step:
            kept.append(line + b"\n")
            rows.append(row)
    io.write(path, b"".join(kept))
    return rows
