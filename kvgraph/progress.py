"""A progress bar for long work, shown only when somebody is looking at a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """`with Progress("encoding", 64) as bar: bar.advance(1, tokens=n)`; enabled None: on a terminal, for more than one."""

    def __init__(self, label: str, total: int, enabled: bool | None = None):
        self.bar = None
        self.started = time.perf_counter()
        if (sys.stderr.isatty() and total > 1) if enabled is None else enabled:
            from rich.console import Console

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(label, total=total, rate="")

    def advance(self, n: int, tokens: int = 0, label: str | None = None) -> None:
        """Count n more items done; `tokens` so far give the rate; `label` replaces the text before the bar."""
        if self.bar is not None:
            rate = f"{tokens / max(1e-9, time.perf_counter() - self.started):,.0f} tokens/s" if tokens else ""
            self.bar.update(self.task, advance=n, rate=rate, description=label)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
