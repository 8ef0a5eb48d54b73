"""Threads for long work without engine state: tokenizing, planning, hashing, the library."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
WORKERS = 2


class Workers:
    """A few threads beside the event loop."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(WORKERS, "kvgraph-worker")

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of something long, run on a thread. Log lines it writes keep the request's id."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self.threads, context.run, work, *arguments)

    def close(self) -> None:
        """Take no more work, and drop what hasn't begun."""
        self.threads.shutdown(wait=False, cancel_futures=True)
