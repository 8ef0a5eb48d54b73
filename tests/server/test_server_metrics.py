"""What Prometheus scrapes."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serving import ANNA, BEN, DOCUMENTS, KEYS, SECRETS, metrics

ROOT = Path(__file__).parents[2]


def test_metrics_count_what_usage_tells(live, tmp_path):
    server = live(store=tmp_path)
    first, second = (server.ask(documents=DOCUMENTS, kvgraph={"method": "block"}).json()["usage"] for _ in range(2))
    found = server.metrics()
    used = [first["kvgraph"], second["kvgraph"]]
    assert used[1]["reused_tokens"]["memory"] > 0 == used[1]["document_tokens_computed"]
    assert found["kvgraph_tokens_computed_total"] == sum(u["computed_tokens"] for u in used)
    assert found['kvgraph_tokens_reused_total{tier="memory"}'] == used[1]["reused_tokens"]["memory"]
    assert found["kvgraph_tokens_generated_total"] == 8
    assert found['kvgraph_answers_total{outcome="length"}'] == 2
    assert found["kvgraph_time_to_first_token_seconds_count"] == 2
    assert found["kvgraph_inter_token_seconds_count"] == 6
    assert found['kvgraph_http_requests_total{method="POST",route="/v1/completions",status="2xx"}'] == 2
    assert found['kvgraph_store_misses_total{tier="disk"}'] > 0
    server.server.engine.flush()
    assert server.metrics()['kvgraph_store_bytes{tier="disk"}'] == server.server.engine.store.stat().bytes > 0
    assert found["kvgraph_kv_bytes"] > 0 == found["kvgraph_kv_pinned_bytes"] == found["kvgraph_requests_running"]
    assert found["kvgraph_http_requests_in_flight"] == 1  # the scrape itself


def test_inference_is_counted_as_the_conventions_name_it(live):
    """OpenTelemetry's gen_ai.server.*, with the buckets that it advises; errors and encodings aren't answers."""
    server = live()
    server.ask(max_tokens=5)
    chat = {"model": server.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60)
    server.ask(documents=[{"segment": "none"}])
    httpx.put(f"{server.url}/v1/segments/a", json={"text": "a fact"}, timeout=60)
    found = {name: value for name, value in server.metrics().items() if name.startswith("gen_ai_")}
    model = f'gen_ai_request_model="{server.name}",gen_ai_response_model="{server.name}"'

    def labels(operation: str, *more: str) -> str:
        return ",".join([*more, f'gen_ai_operation_name="{operation}"', 'gen_ai_provider_name="kvgraph"', model])

    def count(metric: str, labels: str) -> float:
        return found.get(f"gen_ai_server_{metric}_seconds_count{{{labels}}}", 0)

    for operation in ("text_completion", "chat"):
        assert count("request_duration", labels(operation, 'error_type=""')) == 1
        assert count("time_to_first_token", labels(operation)) == 1
    assert count("time_per_output_token", labels("text_completion")) == 1
    assert count("time_per_output_token", labels("chat")) == 0  # one token is the first
    assert count("request_duration", labels("text_completion", 'error_type="404"')) == 1
    assert (
        sum(value for name, value in found.items() if name.startswith("gen_ai_server_request_duration_seconds_count"))
        == 3
    )
    limits = {re.search(r'le="([^"]+)"', name)[1] for name in found if "per_output_token_seconds_bucket" in name}
    assert sorted(map(float, limits)) == [
        0.01,
        0.025,
        0.05,
        0.075,
        0.1,
        0.15,
        0.2,
        0.3,
        0.4,
        0.5,
        0.75,
        1,
        2.5,
        float("inf"),
    ]


def test_no_label_comes_from_a_caller(live):
    server = live(api_keys=KEYS)
    httpx.get(f"{server.url}/v1/models/{SECRETS[0]}", headers=ANNA)
    httpx.get(f"{server.url}/{SECRETS[0]}")
    httpx.request("BREW", f"{server.url}/v1/models", headers=BEN)
    server.ask(ANNA)
    text = httpx.get(f"{server.url}/metrics").text
    assert not [word for word in (*SECRETS, "anna", "ben", "BREW") if word in text]
    assert 'route="unknown"' in text and 'route="/v1/models/{name}"' in text.replace(":path", "")


def test_a_scrape_waits_for_neither_the_engine_nor_the_store(live, tmp_path):
    server = live(store=tmp_path)
    free = threading.Event()
    server.server.runner.call(lambda: free.wait(20))
    try:
        with server.server.engine.store._index_lock:
            started = time.monotonic()
            assert metrics(server.url)["kvgraph_ready"] == 1
            assert time.monotonic() - started < 5
    finally:
        free.set()


def test_the_documented_metrics_are_those_there_are(live, tmp_path):
    server = live(store=tmp_path)
    server.ask(documents=DOCUMENTS)
    server.ask(documents=DOCUMENTS)
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    ours = ("kvgraph_", "gen_ai_")
    there = {(f.name, f.type) for f in families if f.name.startswith(ours) and not f.name.endswith("_created")}
    table = re.findall(
        r"^\| `((?:kvgraph|gen_ai)_\w+)`[^|]*\| (\w+) \|", (ROOT / "docs/how-to/operate.md").read_text(), re.M
    )
    assert {(name.removesuffix("_total"), kind) for name, kind in table} == there
