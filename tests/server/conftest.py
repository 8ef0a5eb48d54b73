"""Servers that tests of the server start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvgraph import Engine, demo, models
from serving import Live, application, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model")
    demo.write_model(made)
    return made


@pytest.fixture(scope="module")
def model(folder) -> models.Model:
    return models.load(folder)


@pytest.fixture(scope="module")
def server(model) -> Iterator[Live]:
    """A server of the module's `model`, on a thread."""
    app = application(Engine(model, kv_budget=1 << 28))
    with serving(app) as url:
        yield Live(app, url)


@pytest.fixture
def live(model) -> Iterator[Callable[..., Live]]:
    """Start a server on a thread: live(kv_budget=…, store=…, **settings)."""
    with ExitStack() as stack:

        def start(kv_budget: int = 1 << 28, store: Path | None = None, **settings: Any) -> Live:
            app = application(Engine(model, store=store, kv_budget=kv_budget), **settings)
            return Live(app, stack.enter_context(serving(app)))

        yield start
