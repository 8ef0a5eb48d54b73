"""Callers: API keys, the tenants behind them, and their limits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvgraph.server.errors import APIError
from kvgraph.server.settings import APIKey


@dataclass(eq=False)
class Caller:
    """A credential at work. tenant: "" when the server has no keys. Limits are per key.

    The salt of a tenant's KV is its name, as the server's configuration has it: nothing a caller sends gets there.
    """

    tenant: str
    requests_per_minute: int | None = None
    concurrent: int | None = None
    running: int = 0
    _tokens: float = field(default=0.0, init=False)
    _filled: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._tokens = float(self.requests_per_minute or 0)
        self._filled = time.monotonic()

    @property
    def salt(self) -> str:
        """Part of the key of every record this caller's requests make or read."""
        return self.tenant

    def count_request(self) -> None:
        """Take one request from the allowance, which refills evenly. Raises APIError 429."""
        if self.requests_per_minute is None:
            return
        now, rate = time.monotonic(), self.requests_per_minute / 60
        self._tokens = min(self.requests_per_minute, self._tokens + (now - self._filled) * rate)
        self._filled = now
        if self._tokens < 1:
            raise APIError(
                429,
                f"this key may send {self.requests_per_minute} requests per minute; wait for the next one",
                code="rate_limit_exceeded",
                retry_after=(1 - self._tokens) / rate,
            )
        self._tokens -= 1

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the key's concurrent requests. Raises APIError 429 when all are taken."""
        if self.concurrent is not None and self.running >= self.concurrent:
            raise APIError(
                429,
                f"this key may have {self.concurrent} requests running at once; wait for one to end",
                code="concurrency_limit_exceeded",
                retry_after=1,
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class Tenants:
    """The configured keys. Only their hashes are kept and looked up, so that timing reveals nothing about a key."""

    def __init__(self, keys: Sequence[APIKey]):
        self._callers = {
            _hash(key.key.get_secret_value()): Caller(key.tenant, key.requests_per_minute, key.concurrent)
            for key in keys
        }
        self._everybody = None if keys else Caller("")
        self.several = len({key.tenant for key in keys}) > 1

    def caller(self, authorization: str | None) -> Caller:
        """Who an Authorization header stands for. Raises APIError 401."""
        if self._everybody is not None:
            return self._everybody
        scheme, _, key = (authorization or "").partition(" ")
        found = self._callers.get(_hash(key.strip())) if scheme.lower() == "bearer" else None
        if found is None:
            raise APIError(401, "give a valid API key as 'Authorization: Bearer KEY'", code="invalid_api_key")
        return found


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
