"""Two memories that keep a slow, dead or empty place from being asked in vain."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable


class Breaker:
    """A circuit breaker: after `failures` in a row, only one call in a while is let through, until one succeeds.

    wait: seconds until the first try; each one that fails doubles it, up to `longest`.
    """

    def __init__(
        self,
        failures: int = 3,
        wait: float = 1.0,
        longest: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._most, self._first, self._longest, self._clock = failures, wait, longest, clock
        self._failed, self._wait, self._next = 0, wait, 0.0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether calls are refused, but for a try now and then."""
        return self._failed >= self._most

    def allows(self) -> bool:
        """Whether to call now. While it is open, the first to ask after the wait makes the try."""
        with self._lock:
            if self._failed < self._most:
                return True
            now = self._clock()
            if now < self._next:
                return False
            self._wait = min(2 * self._wait, self._longest)
            self._next = now + self._wait
            return True

    def succeeded(self) -> None:
        """A call got an answer, whatever it was."""
        with self._lock:
            self._failed, self._wait = 0, self._first

    def failed(self) -> None:
        """A call got none."""
        with self._lock:
            self._failed += 1
            if self._failed == self._most:
                self._next = self._clock() + self._wait


class Absent:
    """Names that weren't there a moment ago: a negative cache of at most `most` names, each for `seconds`."""

    def __init__(self, seconds: float = 5.0, most: int = 100_000, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._most, self._clock = seconds, most, clock
        self._until: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return self._until.get(name, 0.0) > self._clock()

    def add(self, name: str) -> None:
        """It isn't there now."""
        with self._lock:
            self._until.pop(name, None)
            self._until[name] = self._clock() + self._seconds
            while len(self._until) > self._most:
                self._until.popitem(last=False)

    def discard(self, name: str) -> None:
        """It may be there again."""
        with self._lock:
            self._until.pop(name, None)
