"""The two ways to start a cluster, each from its beginning to its end."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import httpx
import pytest
import yaml

from commands import Command
from kvgraph.server.settings import Settings
from serving import DOCUMENTS, STARTED, until, wait_ready

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning"),  # Ray's own
]
BODY = {"prompt": "why?", "max_tokens": 4, "temperature": 0, "documents": DOCUMENTS, "kvgraph": {"method": "block"}}


def ask(url: str, name: str) -> dict:
    answer = httpx.post(f"{url}/v1/completions", json=BODY | {"model": name}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def configurations() -> list[dict]:
    """The applications that the documentation shows: in a file, with a number of replicas that changes, which comes first, and
    inside Kubernetes' own."""
    text = (Path(__file__).parents[2] / "docs/how-to/cluster.md").read_text()
    shown = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)]
    (autoscaled,) = (block["deployments"] for block in shown if "deployments" in block)
    found = [yaml.safe_load(block["spec"]["serveConfigV2"]) if "spec" in block else block for block in shown]
    found = [configuration for configuration in found if "applications" in configuration]
    scaled = copy.deepcopy(found[0])
    del scaled["applications"][0]["args"]["replicas"]
    scaled["applications"][0]["deployments"] = autoscaled
    return [scaled, *found]


def test_the_documented_configurations_are_rays():
    schema = pytest.importorskip("ray.serve.schema", reason="needs kvgraph[ray]")
    found = configurations()
    assert len(found) == 3
    for configuration in found:
        (application,) = schema.ServeDeploySchema.model_validate(configuration).applications
        assert application.import_path == "kvgraph.cluster:app"
        Settings.load(**{name: value for name, value in application.args.items() if name != "replicas"})


@pytest.mark.slow
def test_the_documented_application_behind_rays_own_http_server(local_ray, model_folder, tmp_path):
    """What `serve deploy` does with the documented file, on this machine: the same requests, streams among them."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    serve.start(http_options={"port": 8811})
    configuration = configurations()[0]
    (application,) = configuration["applications"]
    application["args"] |= {"model": str(model_folder), "device": "cpu", "store": [str(tmp_path / "kv")]}
    application["args"] |= {"library": str(tmp_path / "l.sqlite"), "kv_budget": 1 << 27, "grace": 5}
    application["deployments"][0]["ray_actor_options"] = {"num_cpus": 0.1}
    try:
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(configuration), _blocking=True)
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


@pytest.mark.slow
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
