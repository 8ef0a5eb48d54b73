"""The two ways to start a cluster, each from its beginning to its end."""

from __future__ import annotations

import httpx
import pytest

from commands import Command
from serving import DOCUMENTS, STARTED, until, wait_ready

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning"),  # Ray's own
]
BODY = {"prompt": "why?", "max_tokens": 4, "temperature": 0, "documents": DOCUMENTS, "kvgraph": {"method": "block"}}


def ask(url: str, name: str) -> dict:
    answer = httpx.post(f"{url}/v1/completions", json=BODY | {"model": name}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_application_behind_rays_own_http_server(local_ray, model_folder, tmp_path):
    """`serve run kvgraph.cluster:app`: its ingress is a deployment; the same requests, streams among them."""
    from ray import serve

    from kvgraph.cluster import app

    serve.start(http_options={"port": 8811})
    serve.run(app({"model": str(model_folder), "replicas": 1, "kv_budget": 1 << 27, "grace": 5}), name="app")
    try:
        url = "http://127.0.0.1:8811"
        wait_ready(url, 300)
        first = ask(url, model_folder.name)
        again = ask(url, model_folder.name)
        assert first["choices"] == again["choices"]
        assert again["usage"]["kvgraph"]["document_tokens_computed"] == 0
        body = BODY | {"model": model_folder.name, "stream": True}
        lines = httpx.post(f"{url}/v1/completions", json=body, timeout=60).text.split("\n\n")
        assert lines[-2] == "data: [DONE]" and len(lines) > 3
        assert httpx.get(f"{url}/v1/none").json()["error"]["code"] == "unknown_url"
    finally:
        serve.shutdown()


def test_serve_with_replicas_ends_in_order_and_leaves_its_records(model_folder, tmp_path):
    pytest.importorskip("ray", reason="needs kvgraph[ray]")
    store = tmp_path / "kv"
    flags = ["--store", store, "--replicas", 2, "--kv-budget", "128MiB"]
    process = Command("serve", "--model", model_folder, "--port", 0, *flags, fresh=True)
    try:
        until(lambda: STARTED.search(process.stderr) or process.poll() is not None, 120)
        url = STARTED.search(process.stderr)[0]
        wait_ready(url, 300)
        ask(url, model_folder.name)
        process.terminate()
        assert process.wait(120) == 0, process.stderr
    finally:
        process.kill()
    assert len(list(store.glob("records/*/*.safetensors"))) == len(DOCUMENTS)
