"""Threads that work beside the model: it goes first where both want the same processor."""

from __future__ import annotations

import os
import threading

NICE = 5  # a third of a model thread's share; with much more, records come too late on a machine that is busy


def step_back() -> None:
    """Give this thread a lower priority than the model's, where the system can do that for one thread (Linux)."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    except (AttributeError, OSError):  # another system, or a priority that is lower already
        pass
