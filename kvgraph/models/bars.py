"""Whether transformers draws its progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from transformers.utils import logging as transformers_logging

LONG = 1 << 30  # bytes of weights that take long enough to load that people want to see it


def loading(files: Iterable[Path]) -> AbstractContextManager[None]:
    """Inside, a bar shows how loading these files goes, if they are large."""
    return nullcontext() if sum(file.stat().st_size for file in files) >= LONG else no_bar()


@contextmanager
def no_bar() -> Iterator[None]:
    """Inside, transformers draws no progress bar: it would garble the caller's, or there is too little to wait for."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
