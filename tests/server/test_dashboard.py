"""The Grafana dashboard asks for metrics that exist, and a real Prometheus that scrapes a live server answers every query."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from serving import DOCUMENTS

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "kvgraph.json").read_text(encoding="utf-8"))
QUERIES = {f"{p['title']}: {t['legendFormat']}": t["expr"] for p in DASHBOARD["panels"] for t in p["targets"]}


def test_every_metric_is_in_the_documentation():
    table = dict(
        re.findall(r"^\| `(kvgraph_\w+)`[^|]*\| (\w+) \|", (ROOT / "docs/how-to/operate.md").read_text(), re.M)
    )
    asked = {name for query in QUERIES.values() for name in re.findall(r"kvgraph_\w+", query)}
    known = {f"{name}_bucket" if kind == "histogram" else name for name, kind in table.items()}
    assert asked and asked <= known, asked - known


def test_panels_have_numbers_places_and_titles_of_their_own():
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


@pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus here: apt-get install prometheus")
def test_a_real_prometheus_answers_every_query(live, tmp_path):
    server = live(store=tmp_path / "kv")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "prometheus.yml"
    target = server.url.removeprefix("http://")
    config.write_text(
        "global: {scrape_interval: 200ms}\n"
        f"scrape_configs: [{{job_name: kvgraph, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    process = subprocess.Popen(
        ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline, empty = time.monotonic() + 60, dict(QUERIES)
        number = 0
        while empty:
            assert time.monotonic() < deadline, f"without data: {list(empty)}"
            number += 1
            # The same documents again, and others: hits and misses of every tier.
            server.ask(documents=DOCUMENTS, kvgraph={"method": "block"})
            server.ask(documents=[{"text": f"number {number}"}], kvgraph={"method": "block"})
            server.server.engine.flush()
            server.server.runner.call(lambda: server.server.engine.scheduler.memory.pool.evict_to(0)).result()
            time.sleep(0.3)
            for name, query in list(empty.items()):
                query = query.replace("$__rate_interval", "10s").replace("$job", ".*")
                try:
                    answer = httpx.get(
                        f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=5
                    ).json()
                except httpx.TransportError:  # it isn't up yet
                    assert process.poll() is None
                    break
                assert answer["status"] == "success", (name, answer)
                values = [float(result["value"][1]) for result in answer["data"]["result"]]
                if any(value == value for value in values):  # not NaN, as quotients and quantiles of nothing are
                    del empty[name]
    finally:
        process.kill()
        process.wait()
