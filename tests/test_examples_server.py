"""The client examples, each run as a reader would run it, against a live server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvgraph import demo
from serving import serve

EXAMPLES = Path(__file__).parent.parent / "examples"
KEY = "an-example-key"

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    demo.write_model(folder)
    return folder


def run(*command: object, url: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"KVGRAPH_URL": url, "PYTHONIOENCODING": "utf-8"} | environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )


def test_openai_chat(model):
    with serve(model) as url:
        done = run(sys.executable, EXAMPLES / "openai_chat.py", url=url)
        assert done.returncode == 0, done.stderr
        costs = [int(line.split()[0]) for line in done.stdout.splitlines() if "document tokens computed" in line]
        assert len(costs) == 2 and costs[0] > 100 and costs[1] == 0


def test_openai_async_stream(model):
    with serve(model) as url:
        done = run(sys.executable, EXAMPLES / "openai_async_stream.py", url=url)
        assert done.returncode == 0, done.stderr
        for question in ("When was the lighthouse built?", "Who kept it first?", "Where does it stand?"):
            *pieces, last = [line for line in done.stdout.splitlines() if line.startswith(question)]
            assert len(pieces) > 1 and "first token after" in last


def test_curl(model):
    if shutil.which("curl") is None:
        pytest.skip("curl isn't installed")
    with serve(model, api_keys=[{"key": KEY, "tenant": "examples"}]) as url:
        done = run("bash", EXAMPLES / "curl.sh", url=url, KVGRAPH_KEY=KEY)
        assert done.returncode == 0, done.stdout + done.stderr
        parts = dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])
        models, chat, stored, stream, deleted = parts.values()
        assert json.loads(models)["data"][0]["id"] == model.name
        assert json.loads(chat)["usage"]["kvgraph"]["method"] == "graph-kv"
        assert json.loads(stored)["data"][0]["computed_tokens"] > 0
        *chunks, last = [line.removeprefix("data: ") for line in stream.splitlines() if line]
        assert last == "[DONE]" and json.loads(chunks[-1])["usage"]["kvgraph"]["reused_tokens"]["memory"] > 0
        assert json.loads(deleted)["deleted"] is True

        refused = run("bash", EXAMPLES / "curl.sh", url=url, KVGRAPH_KEY="another-key")
        assert refused.returncode != 0 and "invalid_api_key" in refused.stdout
