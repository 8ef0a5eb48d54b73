"""The tests of the `openai` client against two replicas: the answers are the engine's, token for token."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from clusters import kill_replica, replica_of
from kvgraph.server.settings import Settings
from serving import LONG, metrics, serving, until
from soak import SOAK

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
from test_server_openai import (  # noqa: F401  # fixtures, and tests that run here too
    DOCUMENTS,
    ask,
    client,
    engine,
    expected,
    model,
    test_a_chat_without_documents_is_one_plain_prompt,
    test_a_deadline_ends_an_answer_whether_streamed_or_not,
    test_a_stream_gives_the_answer_piece_by_piece,
    test_an_answer_over_documents_is_the_engines,
    test_completions_over_documents,
    test_completions_stream_too,
    test_log_probabilities_are_the_engines,
    test_models,
    test_seeded_sampling_is_the_engines_and_choice_i_has_seed_plus_i,
    test_stop_strings_and_stop_tokens_end_an_answer,
    test_the_async_client,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:this model doesn't declare tuning"),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning"),  # Ray's own
]
ROOT = Path(__file__).parents[2]
READY = 400.0  # seconds that two replicas may take on a busy machine
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def url(local_ray, model, tmp_path_factory) -> Iterator[str]:  # noqa: F811
    """Two replicas behind one server, with a store of both."""
    from kvgraph.cluster.serving import local_app

    store = tmp_path_factory.mktemp("cluster") / "kv"
    with serving(local_app(Settings.load(model=str(model), kv_budget=1 << 27, store=store, grace=5), 2), READY) as url:
        yield url


def share(url: str, source: str) -> float:
    return sum(n for name, n in metrics(url).items() if name.startswith("kvgraph_replica_tokens") and source in name)


def test_a_request_goes_where_its_documents_are(client, url):  # noqa: F811
    """Each document's second reader finds it in memory, though there are two memories."""
    texts = [[{"text": f"fact {i} " + "of many words " * 4}] for i in range(4)]
    over = {"kvgraph": {"method": "block"}}
    for documents in texts:
        ask(client, extra_body={"documents": documents, **over})
    before = metrics(url)
    for documents in texts:
        usage = ask(client, "And now?", extra_body={"documents": documents, **over}).usage
        assert usage.kvgraph["document_tokens_computed"] == 0
        assert usage.kvgraph["reused_tokens"].keys() == {"memory"}
    now = metrics(url)
    assert now['kvgraph_routed_total{by="spans"}'] - before['kvgraph_routed_total{by="spans"}'] == 4
    assert now["kvgraph_replicas"] == 2
    assert share(url, "memory") > 0
    until(lambda: not sum(n for name, n in metrics(url).items() if name.startswith("kvgraph_replica_requests")))


def test_a_tool_is_called(client):  # noqa: F811
    answer = ask(client, tools=[TOOL], tool_choice="required", max_tokens=60, logit_bias={str(ord("}")): 0})
    assert answer.choices[0].message.tool_calls[0].function.name == "look"


def test_segments_and_graphs_are_the_clusters(url):
    texts = [{"id": f"s{i}", "text": f"stored fact {i}"} for i in range(3)]
    stored = httpx.put(f"{url}/v1/segments", json={"segments": texts}, timeout=60).json()
    assert all(s["computed_tokens"] == s["tokens"] for s in stored["data"])
    assert httpx.get(f"{url}/v1/segments/s0").json()["tier"] == "memory"
    graph = {"id": "g", "segments": ["s0", "s1", "s2"], "edges": [[0, 2], [1, 2]]}
    assert httpx.post(f"{url}/v1/graphs", json=graph).status_code == 202
    until(lambda: httpx.get(f"{url}/v1/graphs/g").json()["state"] == "ready", 60)
    body = {"model": "tiny", "prompt": "why?", "max_tokens": 4, "kvgraph": {"graph": "g"}}
    usage = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"]["kvgraph"]
    assert usage["document_tokens_computed"] == 0
    assert httpx.delete(f"{url}/v1/graphs/g", timeout=60).status_code == 200
    assert httpx.delete(f"{url}/v1/segments/s0", timeout=60).status_code == 200
    again = httpx.put(f"{url}/v1/segments", json={"segments": texts[:1]}, timeout=60).json()["data"][0]
    assert again["computed_tokens"] == again["tokens"]  # no replica had kept it


def test_the_dashboard_and_the_docs_name_metrics_that_are_there(client, url):  # noqa: F811
    # A replica has counts of tokens only after it has read some.
    ask(client, extra_body={"documents": DOCUMENTS, "kvgraph": {"method": "block"}})
    there = {name.partition("{")[0] for name in metrics(url)}
    ours = {name for name in there if re.match("kvgraph_(replica|routed|retried)", name)}
    panels = json.loads((ROOT / "docs/grafana/kvgraph-cluster.json").read_text())["panels"]
    asked = {name for p in panels for t in p["targets"] for name in re.findall(r"kvgraph_\w+", t["expr"])}
    table = set(re.findall(r"^\| `(kvgraph_\w+)`", (ROOT / "docs/how-to/cluster.md").read_text(), re.M))
    assert asked <= there and table == ours


def by_replica(url: str, name: str) -> dict[str, float]:
    """The values of a metric, by replica, of all other labels together."""
    found: dict[str, float] = {}
    for sample, value in metrics(url).items():
        if sample.startswith(name + "{"):
            replica = re.search(r'replica="([^"]+)"', sample)[1]
            found[replica] = found.get(replica, 0) + value
    return found


def test_metrics_say_what_each_replica_did(client, url):  # noqa: F811
    """Tokens by source add up to those of the answers. Steps, memory and stores are shown for each replica, and the one that
    answers shows its load.
    """
    names = by_replica(url, "kvgraph_replica_requests").keys()
    sources = ("computed", "memory", "loaded")
    before = {source: share(url, source) for source in sources}
    steps = sum(by_replica(url, "kvgraph_step_seconds_count").values())
    routed = metrics(url)['kvgraph_routed_total{by="spans"}']
    told = dict.fromkeys(sources, 0)
    for i in (0, 1, 0, 1):
        documents = [{"text": f"measured {i} " + "some words " * 3}]
        usage = ask(client, extra_body={"documents": documents, "kvgraph": {"method": "block"}}).usage.kvgraph
        told["computed"] += usage["document_tokens_computed"]
        told["memory"] += usage["reused_tokens"].get("memory", 0)
    assert told["computed"] and told["memory"] >= told["computed"]
    assert {source: share(url, source) - before[source] for source in sources} == told
    assert metrics(url)['kvgraph_routed_total{by="spans"}'] == routed + 4

    until(lambda: sum(by_replica(url, "kvgraph_step_seconds_count").values()) > steps)
    assert by_replica(url, "kvgraph_kv_budget_bytes") == dict.fromkeys(names, 1 << 27)
    assert sum(by_replica(url, "kvgraph_kv_bytes").values()) > 0
    until(lambda: sum(by_replica(url, "kvgraph_store_written_bytes_total").values()) > 0)
    assert by_replica(url, "kvgraph_store_available") == dict.fromkeys(names, 1)

    with ask(client, stream=True, max_tokens=LONG, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        assert sorted(by_replica(url, "kvgraph_replica_requests").values()) == [0, 1]
    until(lambda: sorted(by_replica(url, "kvgraph_replica_requests").values()) == [0, 0])


# -- replicas that are killed -------------------------------------------------------------------------------------------


def test_a_replica_that_is_killed_ends_its_stream_with_an_error_and_nothing_else(client, engine, url):  # noqa: F811
    """Streams end with an error; what isn't streamed is begun again and has its right answer; no one need do anything."""
    for _ in range(20 if SOAK else 1):
        until(lambda: metrics(url)["kvgraph_replicas"] == 2, READY)
        stream = ask(client, stream=True, max_tokens=LONG, extra_body={"ignore_eos": True})
        next(iter(stream))
        victim = replica_of(url)
        with ThreadPoolExecutor(4) as pool:
            asked = [
                pool.submit(ask, client, extra_body={"documents": DOCUMENTS[:n], "kvgraph": {"method": "block"}})
                for n in (1, 2, 3, 3)
            ]
            threading.Timer(0.05, kill_replica, [victim]).start()
            with pytest.raises(openai.APIError, match="the replica that answered has failed") as told:
                for _ in stream:
                    pass
            assert told.value.code == "replica_lost"
            texts = [answer.result(120).choices[0].message.content for answer in asked]
        assert texts[2] == texts[3] == expected(engine, "block").text
        assert (
            ask(client, extra_body={"documents": DOCUMENTS, "kvgraph": {"method": "block"}}).choices[0].message.content
            == texts[3]
        )
