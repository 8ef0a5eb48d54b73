"""Whatever is sent, the server answers in the shapes it documents, never with a fault of its own, and goes on serving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig
from serving import serve

from kvgraph import demo
from kvgraph.server.app import create_app
from kvgraph.server.settings import Settings

SOAK = os.environ.get("KVGRAPH_SOAK", "0") not in ("", "0")
KEY = "the-key-of-ann"
load_all_checks()
(positive_data_acceptance,) = CHECKS.get_by_names(["positive_data_acceptance"])


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("fuzz") / "tiny"
    folder.mkdir()
    demo.write_model(folder)
    with serve(folder, default_max_tokens=2, api_keys=[{"key": KEY, "tenant": "ann"}]) as url:
        yield url


CONFIG = {"auth": {"openapi": {"HTTPBearer": {"bearer": KEY}}}, "seed": 1, "cache": {"enabled": False}}
api = schemathesis.openapi.from_dict(
    create_app(Settings(model="tiny")).openapi(), config=SchemathesisConfig.from_dict(CONFIG)
)


@api.parametrize()
@settings(max_examples=300 if SOAK else int(os.environ.get("FZ","8")), suppress_health_check=list(HealthCheck), deadline=None, database=None)
def test_every_route_keeps_to_its_document(case, url):
    _within_reach(case.body)
    case.call_and_validate(url, excluded_checks=[positive_data_acceptance])


def _within_reach(body: Any) -> None:
    """Let a valid request get beyond the model's name, and take neither long nor too short a time."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    if "blocks" in body:
        body.setdefault("max_new_tokens", 2)
    for name in ("max_tokens", "max_completion_tokens", "max_new_tokens"):
        if isinstance(body.get(name), int) and 2 < body[name] <= 1 << 24:
            body[name] = 2
    options = body.get("kvgraph")
    if isinstance(options, dict) and isinstance(options.get("timeout"), int | float) and options["timeout"] > 0:
        options["timeout"] = 60
