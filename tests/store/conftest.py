"""Real servers for tests of the store's remote tiers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from remotes import RedisServer, S3Server


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="session")  # it takes seconds to start; each test has a prefix of its own
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.kill()
