"""The server that clients are tried on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvgraph import Engine, demo, models
from serving import Live, application, serving


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("clients") / "tiny"
    made.mkdir()
    demo.write_model(made)
    return made


@pytest.fixture(scope="session")
def server(folder) -> Iterator[Live]:
    """A live server of a tiny model with random weights: its answers are noise, and JSON only where it is made to be."""
    app = application(Engine(models.load(folder), kv_budget=1 << 28), served_name="tiny")
    with serving(app) as url:
        yield Live(app, url)
