"""Clients that people use, unmodified, against a live server: each script in `scripts` is one of them and checks itself.

Each script runs as a process of its own. Clients that can't be installed beside kvgraph's tested versions get an environment
of their own; that takes minutes and runs in `make soak`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

from soak import some

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
BESIDE = {  # script -> what it imports
    "openai_python": "openai",
    "langchain_chat": "langchain_openai",
    "haystack_chat": "haystack",
    "pydantic_ai_agents": "pydantic_ai",
}
APART = {  # script -> what is installed for it, apart
    "instructor_models": "instructor==1.17.0",
    "llama_index_llms": "llama-index-llms-openai-like==0.8.1",
}
GUIDELLM = Path(sys.prefix) / "guidellm" / "bin" / "python"  # `make test` makes it
NODE_CLIENT = "openai@6.49.0"
QUIET = {  # they would tell their makers that they are used
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LANGSMITH_TRACING": "false",
}


def environment(server) -> dict[str, str]:
    """What a script finds in its environment: the server, the model, and nothing of a proxy."""
    given = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "PYTHONPATH"}
    return given | QUIET | {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none", "MODEL": server.name}


def start(command: list[str | Path], server, cwd: Path | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=environment(server), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen, seconds: float = 120) -> str:
    """What a process wrote, once it has ended well."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, said[-4000:]
    return said


def test_every_script_is_run():
    named = {f"{name}.py" for name in (*BESIDE, *APART)} | {"openai_node.mjs"}
    assert {path.name for path in SCRIPTS.iterdir() if path.is_file()} == named


def test_the_page_names_every_test():
    """docs/clients.md: each line of its first table names a script or a test that there is, and none is left out."""
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8").split("## Connect")[0]
    named = re.findall(r"\| `([\w./]+)`(, soak)? \|$", page, re.M)
    tests = Path(__file__).read_text(encoding="utf-8")
    for name, soak in named:
        if name in BESIDE or name in APART or name == "openai_node":
            assert bool(soak) == (name not in BESIDE), name
        else:
            assert f"def {name}(" in tests or (ROOT / name).exists() or (Path(__file__).parent / name).exists(), name
    assert {*BESIDE, *APART, "openai_node"} <= {name for name, _ in named}


@pytest.mark.parametrize("name", BESIDE)
def test_a_client(server, name):
    if not find_spec(BESIDE[name]):
        pytest.skip(f"{BESIDE[name]} isn't installed: pip install -e .[clients]")
    finish(start([sys.executable, SCRIPTS / f"{name}.py"], server))


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_a_client_apart(server, tmp_path, name):
    python = installed(tmp_path / "venv", APART[name])
    finish(start([python, SCRIPTS / f"{name}.py"], server))


@pytest.mark.slow
def test_the_client_for_node(server, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    shutil.copy(SCRIPTS / "openai_node.mjs", tmp_path)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", NODE_CLIENT], cwd=tmp_path, check=True, timeout=300)
    finish(start(["node", "openai_node.mjs"], server, tmp_path))


def test_guidellm_measures(server, folder, tmp_path):
    """Its benchmark as it is, in each of the formats that it has for text: every request is answered and counted."""
    if not GUIDELLM.exists():
        pytest.skip("needs guidellm in an environment of its own: make .venv/.ready-guidellm")
    formats = some(["/v1/chat/completions", "/v1/completions", "/v1/responses"], 1)
    started = []
    for i, form in enumerate(formats):
        backend = f"kind=openai_http,target={server.url},model={server.name},request_format={form}"
        command = [
            GUIDELLM, "-m", "guidellm", "run", "--backend", backend, "--profile", "kind=synchronous",
            "--constraint", "kind=max_requests,count=3", "--tokenizer", f"kind=hf_auto,model={folder}",
            "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
            "--output", f"kind=json,path={tmp_path / f'{i}.json'}", "--disable-console",
        ]  # fmt: skip
        started.append(start(command, server))
    for i, process in enumerate(started):
        finish(process, 300)
        (measured,) = json.loads((tmp_path / f"{i}.json").read_text())["benchmarks"]
        totals = measured["metrics"]["request_totals"]
        assert totals["successful"] == totals["total"] > 0, totals  # its last request may not be counted
        assert measured["metrics"]["output_token_count"]["successful"]["mean"] == 8


def installed(folder: Path, package: str) -> Path:
    """The Python of a new environment that has a package, with what it asks for, before the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (inside / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "-q", package], check=True, timeout=900)
    return python
