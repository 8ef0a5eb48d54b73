"""A progress bar for long work, shown on terminals only."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """`with Progress("encoding", 64) as bar: bar.advance(1, tokens=n)`.

    total: number of items; None if unknown.
    enabled: None shows the bar on a terminal, for more than one item.
    done: items done by an earlier run.
    """

    def __init__(self, label: str, total: int | None, enabled: bool | None = None, done: int = 0):
        self.console = Console(stderr=True)
        self.bar = None
        self.started = time.perf_counter()
        if (sys.stderr.isatty() and total != 1 and total != 0) if enabled is None else enabled:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Bar(*columns, TimeRemainingColumn(), console=self.console, refresh_per_second=4)
            self.task = self.bar.add_task(label, total=total, completed=done, note="")

    def advance(self, n: int, tokens: int = 0, label: str | None = None) -> None:
        """Count n more items as done. tokens: processed so far, for the rate. label: the new text before the bar."""
        if self.bar is not None:
            rate = f"{tokens / max(1e-9, time.perf_counter() - self.started):,.0f} tokens/s" if tokens else ""
            self.bar.update(self.task, advance=n, note=rate, description=label)

    def show(self, done: int | None = None, note: str | None = None, label: str | None = None) -> None:
        """Set the number of items done and the texts after and before the bar; None leaves each as it is."""
        if self.bar is not None:
            texts: dict[str, Any] = {} if note is None else {"note": note}
            self.bar.update(self.task, completed=done, description=label, **texts)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self) -> None:
        """Show the bar. A `with` block does this by itself."""
        if self.bar is not None:
            self.bar.start()

    def stop(self) -> None:
        """End the bar. A `with` block does this by itself."""
        if self.bar is not None:
            self.bar.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
