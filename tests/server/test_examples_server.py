"""The client examples, and those in docs/how-to/serve.md, each run as a reader would run it, against a live server."""

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

ROOT = Path(__file__).parents[2]
EXAMPLES, GUIDE = ROOT / "examples", ROOT / "docs" / "how-to" / "serve.md"
KEY = "an-example-key"

with_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl isn't installed")

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    demo.write_model(folder, seed=1)  # with which no answer ends at once
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


@with_curl
def test_curl(model):
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


def block(section: str, language: str) -> str:
    """The first code block of a language in a section of the guide."""
    text = GUIDE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return text.split(f"```{language}\n")[1].split("```")[0]


@with_curl
def test_the_guide(model):
    with serve(model) as url:
        code = block("Clients", "python").replace("http://127.0.0.1:8771", url)
        done = run(sys.executable, "-c", code, url=url)
        assert done.returncode == 0, done.stderr
        assert "'document_tokens_computed': " in done.stdout.splitlines()[-1]

        command = block("Graph-KV's endpoints", "sh").replace("http://127.0.0.1:8771", url)
        answer = json.loads(run("bash", "-c", command, url=url).stdout)
        assert answer.keys() == {"ret", "generated", "message"} and answer["ret"] == 0
