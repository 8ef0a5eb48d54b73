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
    there = {(f.name, f.type) for f in families if f.name.startswith("kvgraph_") and not f.name.endswith("_created")}
    table = re.findall(r"^\| `(kvgraph_\w+)`[^|]*\| (\w+) \|", (ROOT / "docs/how-to/operate.md").read_text(), re.M)
    assert {(name.removesuffix("_total"), kind) for name, kind in table} == there
