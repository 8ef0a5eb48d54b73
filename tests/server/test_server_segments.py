"""Stored segments and graphs on a live server: encoded ahead of time, named by requests, kept over restarts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import serving
from kvgraph import demo
from kvgraph.data.library import Library, NotStoredError, StoredSegment
from kvgraph.engine.engine import Engine
from kvgraph.engine.sampling import SamplingParams
from kvgraph.graph import ContextGraph
from kvgraph.methods import GraphKV
from kvgraph.server.settings import SettingsError
from kvgraph.store.disk import DiskStore

ALICE, BOB = {"Authorization": "Bearer key-of-alice"}, {"Authorization": "Bearer key-of-bob"}
KEYS = [{"key": "key-of-alice", "tenant": "alice"}, {"key": "key-of-bob", "tenant": "bob"}]
TEXTS = {
    "a": "The lighthouse stands on the north cape.",
    "b": "Ships pass it at night.",
    "c": "It was built of basalt.",
}
EDGES = [["a", "b"], ["b", "c"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    demo.write_model(folder)
    return folder


@contextmanager
def client(model: Path | Engine, **settings) -> Iterator[httpx.Client]:
    with serving.serve(model, served_name="tiny", **settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def live(model) -> Iterator[httpx.Client]:
    """A server with two tenants, for tests that leave nothing behind or use names of their own."""
    with client(model, api_keys=KEYS) as http:
        http.headers.update(ALICE)
        yield http


def ask(http: httpx.Client, status: int = 200, **body) -> dict:
    headers = body.pop("headers", {})
    body = {"model": "tiny", "prompt": "Where?", "max_tokens": 4, "temperature": 0} | body
    answer = http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


def put(http: httpx.Client, texts: dict[str, str], **headers) -> list[dict]:
    body = {"segments": [{"id": id, "text": text} for id, text in texts.items()]}
    answer = http.put("/v1/segments", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def post_graph(http: httpx.Client, status: int = 202, **body) -> dict:
    answer = http.post("/v1/graphs", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def wait_ready(http: httpx.Client, id: str) -> dict:
    deadline = time.monotonic() + 60
    while (graph := http.get(f"/v1/graphs/{id}").json())["state"] in ("pending", "running"):
        assert time.monotonic() < deadline, graph
        time.sleep(0.02)
    return graph


def drop(http: httpx.Client, *paths: str) -> None:
    for path in paths:
        assert http.delete(f"/v1/{path}").status_code == 200, path


def error(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


# segments


def test_a_segment_is_encoded_once_and_named_by_requests(live):
    (first,) = put(live, {"cape": TEXTS["a"]})
    assert first["computed_tokens"] == first["tokens"] == len(TEXTS["a"] + "\n\n")
    assert first["bytes"] == first["tokens"] * serving.token_bytes()
    (again,) = put(live, {"cape": TEXTS["a"]})
    assert (again["computed_tokens"], again["reused_tokens"]) == (0, {"memory": first["tokens"]})
    assert again["created"] == first["created"]
    asked = ask(live, documents=[{"segment": "cape"}], kvgraph={"method": "block"})
    assert asked["usage"]["kvgraph"]["document_tokens_computed"] == 0
    inline = ask(live, documents=[{"text": TEXTS["a"]}], kvgraph={"method": "block"})
    assert asked["choices"] == inline["choices"]
    drop(live, "segments/cape")


def test_one_text_needs_no_list_and_no_id(live):
    answer = live.put("/v1/segments", json={"title": "Cape", "text": "North."})
    (segment,) = answer.json()["data"]
    assert segment["id"].startswith("seg-") and segment["tokens"] == len("Cape\nNorth.\n\n")
    assert live.put("/v1/segments", json={"title": "Cape", "text": "North."}).json()["data"][0]["id"] == segment["id"]
    shown = live.get(f"/v1/segments/{segment['id']}").json()
    assert (shown["title"], shown["text"], shown["tier"]) == ("Cape", "North.", "memory")
    drop(live, f"segments/{segment['id']}")


def test_an_id_stands_for_one_text(live):
    put(live, {"one": "first"})
    assert "DELETE it first" in error(live.put("/v1/segments", json={"id": "one", "text": "second"}), 409)
    batch = {"segments": [{"id": "new", "text": "x"}, {"id": "one", "text": "second"}]}
    error(live.put("/v1/segments", json=batch), 409)
    error(live.get("/v1/segments/new"), 404)  # all or none
    drop(live, "segments/one")


def test_deleting_takes_the_record_too(live):
    put(live, {"gone": "a text that only this test has"})
    drop(live, "segments/gone")
    error(live.get("/v1/segments/gone"), 404)
    error(live.delete("/v1/segments/gone"), 404)
    assert "PUT /v1/segments" in ask(live, 404, documents=[{"segment": "gone"}])["error"]["message"]
    (again,) = put(live, {"gone": "a text that only this test has"})
    assert again["computed_tokens"] == again["tokens"]
    drop(live, "segments/gone")


def test_segments_are_listed_in_pages(live):
    put(live, {f"page-{i}": f"text {i}" for i in range(5)})
    page = live.get("/v1/segments", params={"limit": 3}).json()
    assert [s["id"] for s in page["data"]] == ["page-0", "page-1", "page-2"] and page["has_more"]
    rest = live.get("/v1/segments", params={"limit": 3, "after": "page-2"}).json()
    assert [s["id"] for s in rest["data"]] == ["page-3", "page-4"] and not rest["has_more"]
    drop(live, *(f"segments/page-{i}" for i in range(5)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"segments": []}, "at least 1"),
        ({"text": ""}, "has no tokens"),
        ({"id": "../../etc/passwd", "text": "x"}, "pattern"),
        ({"id": "a/b", "text": "x"}, "pattern"),
        ({"id": "..", "text": "x"}, "pattern"),
        ({"id": "", "text": "x"}, "pattern"),
        ({"id": "x" * 201, "text": "x"}, "pattern"),
        ({"id": "x", "text": "y", "tenant": "bob"}, "tenant is not a known field"),
        ({"id": "x"}, "give text, or segments"),
        ({"text": "x", "segments": [{"text": "x"}]}, "give text, or segments"),
        ({"text": "z" * 200_000}, "position|budget"),
        ({"segments": [{"text": str(i)} for i in range(1001)]}, "at most 1000"),
        ({"segments": [{"id": "x", "text": "1"}, {"id": "x", "text": "2"}]}, "another text"),
        (["x"], "."),
    ],
)
def test_wrong_segments_are_refused(live, body, message):
    answer = live.put("/v1/segments", json=body)
    assert answer.status_code in (400, 409), answer.text
    assert re.search(message, answer.json()["error"]["message"]), answer.text
    assert live.get("/v1/segments").json()["data"] == []


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("segments", b'{"text": "\\ud800"}'),
        ("segments", b'{"text": "x", "title": "\\udfff"}'),
        ("graphs", b'{"segments": ["a\\ud800"]}'),
        ("completions", b'{"model": "tiny", "prompt": "\\ud800"}'),
        ("completions", b'{"model": "tiny", "prompt": "x", "kvgraph": {"graph": "\\ud800"}}'),
        ("completions", b'{"model": "tiny", "prompt": "x", "documents": [{"segment": "\\ud800"}]}'),
    ],
)
def test_halves_of_surrogate_pairs_are_refused(live, route, body):
    method = "PUT" if route == "segments" else "POST"
    answer = live.request(method, f"/v1/{route}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("id", ["%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a%00b", "a b", "%ff", "x" * 300, "-x"])
def test_path_like_ids_are_never_paths(live, id):
    for resource in ("segments", "graphs"):
        assert live.get(f"/v1/{resource}/{id}").status_code in (400, 404)
        assert live.delete(f"/v1/{resource}/{id}").status_code in (400, 404)


def test_forgetting_disturbs_no_running_request(model):
    engine = Engine.load(model, check=False)
    graph = ContextGraph(list(TEXTS.values()), "Where?")
    expected = engine.generate(graph, "block", max_tokens=8).text
    request = engine.submit(engine.plan(graph, "block"), SamplingParams(max_tokens=8))
    engine.step()
    engine.forget(request.keys)
    assert engine.wait(request).text == expected
    assert {engine.tier(key) for key in request.keys} == {"memory"}
    engine.forget(request.keys)
    assert {engine.tier(key) for key in request.keys} == {None}


# graphs


def test_a_graph_is_encoded_in_the_background_and_named_by_requests(live):
    put(live, TEXTS)
    posted = post_graph(live, id="island", segments=list(TEXTS), edges=EDGES, rounds=2)
    assert (posted["segments"], posted["edges"], posted["fields"]["band"]) == (3, 2, len(TEXTS["a"]) + 2)
    graph = wait_ready(live, "island")
    assert (graph["state"], graph["done"], graph["error"]) == ("ready", 3, None)
    # a alone, b after a, c after that b; what b and c were before is read by nothing that a query sees
    assert (graph["spans"], graph["tokens"]) == (3, sum(len(text) + 2 for text in TEXTS.values()))
    for chosen in (["c"], ["b", "a"], None):
        options = {"graph": "island"} | ({} if chosen is None else {"segments": chosen})
        asked = ask(live, kvgraph=options)
        assert asked["usage"]["kvgraph"]["document_tokens_computed"] == 0, chosen
        assert asked["usage"]["kvgraph"]["method"] == "graph-kv"
    assert "uses segment" in error(live.delete("/v1/segments/b"), 409)
    drop(live, "graphs/island", *(f"segments/{id}" for id in TEXTS))


def test_a_request_over_a_graph_equals_the_whole_plan(model):
    """The answer is the engine's own over the whole graph, also before anything is encoded, and it computes the same keys."""
    engine = Engine.load(model, check=False)
    whole = ContextGraph({n: t + "\n\n" for n, t in TEXTS.items()}, "Where?", edges=EDGES, chosen=["c", "a"])
    method = GraphKV(rounds=2, band=len(TEXTS["a"]) + 2)
    expected = engine.generate(whole, method, max_tokens=12)
    with client(model) as http:
        put(http, TEXTS)
        post_graph(http, id="island", segments=list(TEXTS), edges=EDGES, rounds=2)
        answers = [ask(http, max_tokens=12, kvgraph={"graph": "island", "segments": ["c", "a"]})]
        wait_ready(http, "island")
        answers.append(ask(http, max_tokens=12, kvgraph={"graph": "island", "segments": ["c", "a"]}))
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "Where?"}], "max_tokens": 2}
        chatted = http.post("/v1/chat/completions", json=chat | {"kvgraph": {"graph": "island", "segments": ["c"]}})
    assert [a["choices"][0]["text"] for a in answers] == [expected.text] * 2
    assert answers[1]["usage"]["kvgraph"]["document_tokens_computed"] == 0
    assert answers[1]["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert chatted.json()["usage"]["kvgraph"]["document_tokens_computed"] <= len("user: ")


def test_a_graph_may_bring_its_texts_and_no_id(live):
    texts = [{"id": name, "text": text} for name, text in TEXTS.items()]
    posted = post_graph(live, segments=texts, edges="chain", method="graph-kv:layout=tight")
    assert posted["id"].startswith("graph-") and posted["fields"]["layout"] == "tight"
    assert post_graph(live, segments=list(TEXTS), edges=[[0, 1], [1, 2]], method="graph-kv-ego")["id"] == posted["id"]
    assert wait_ready(live, posted["id"])["state"] == "ready"
    assert [g["id"] for g in live.get("/v1/graphs").json()["data"]] == [posted["id"]]
    asked = ask(live, kvgraph={"graph": posted["id"], "segments": ["b"]})
    assert asked["usage"]["kvgraph"]["document_tokens_computed"] == 0
    assert "other content" in error(live.post("/v1/graphs", json={"id": posted["id"], "segments": ["a"]}), 409)
    drop(live, f"graphs/{posted['id']}")
    recomputed = ask(
        live, documents=[{"segment": n} for n in TEXTS], kvgraph={"method": "graph-kv-ego", "edges": "chain"}
    )
    assert recomputed["usage"]["kvgraph"]["document_tokens_computed"] > 0, "what was encoded along edges is gone"
    drop(live, *(f"segments/{id}" for id in TEXTS))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"segments": ["nobody"]}, 404, "no segment 'nobody'"),
        ({"segments": []}, 400, "at least 1"),
        ({"segments": ["a", "a"]}, 400, "both named 'a'"),
        ({"segments": ["a", "b"], "edges": [["a", "x"]]}, 400, "no segment named 'x'"),
        ({"segments": ["a", "b"], "edges": [[0, 7]]}, 400, "no segment 7"),
        ({"segments": ["a", "b"], "edges": [[0, 1], [0, 1]]}, 400, "given twice"),
        ({"segments": ["a", "b"], "edges": "spiral"}, 400, "aren't known; give all, chain"),
        ({"segments": ["a"], "method": "full"}, 400, "full reads no edges"),
        ({"segments": ["a"], "method": "magic"}, 400, "no method 'magic'"),
        ({"segments": ["a"], "method": "graph-kv-rag"}, 400, "depends on every segment of the graph"),
        ({"segments": ["a"], "band": 3}, 400, "more than the band of 3"),
        ({"segments": ["a"], "rounds": -1}, 400, "rounds must be"),
        ({"segments": ["a"], "colour": 1}, 400, "colour: neither an option nor a field"),
        ({"segments": ["a"], "band": 10**9, "rounds": 1}, 400, "the model's limit"),
        ({"segments": ["a", "b"], "edges": [[0, 1]] * 200_001}, 400, "at most 200000"),
    ],
)
def test_wrong_graphs_are_refused(live, body, status, message):
    put(live, {"a": TEXTS["a"], "b": TEXTS["b"]})
    assert message in error(live.post("/v1/graphs", json=body), status)
    assert live.get("/v1/graphs").json()["data"] == []
    drop(live, "segments/a", "segments/b")


def test_what_does_not_go_with_a_graph_is_refused(live):
    post_graph(live, id="g", segments=[{"id": n, "text": t} for n, t in TEXTS.items()])
    wait_ready(live, "g")
    for more in ({"method": "block"}, {"edges": "all"}, {"rounds": 2}):
        assert "leave out kvgraph." in ask(live, 400, kvgraph={"graph": "g"} | more)["error"]["message"]
    refused = ask(live, 400, kvgraph={"graph": "g"}, documents=[{"text": "x"}])
    assert "leave out documents" in refused["error"]["message"]
    assert "name it in kvgraph.graph" in ask(live, 400, kvgraph={"segments": ["a"]})["error"]["message"]
    assert "no graph 'h'" in ask(live, 404, kvgraph={"graph": "h"})["error"]["message"]
    assert "no segment 'x'" in ask(live, 404, kvgraph={"graph": "g", "segments": ["x"]})["error"]["message"]
    assert "chosen twice" in ask(live, 400, kvgraph={"graph": "g", "segments": ["a", "a"]})["error"]["message"]
    drop(live, "graphs/g", *(f"segments/{id}" for id in TEXTS))


def test_segments_that_do_not_fit_are_dropped_from_the_end(model):
    engine = Engine.load(model, check=False, kv_budget=70 * serving.token_bytes())
    with client(engine, overflow="drop") as http:
        post_graph(http, id="g", segments=[{"id": n, "text": t} for n, t in TEXTS.items()])
        assert wait_ready(http, "g")["state"] == "ready"
        asked = ask(http, kvgraph={"graph": "g", "segments": ["b", "c", "a"]})
        assert asked["usage"]["kvgraph"]["dropped"] == ["a"]


def test_a_graph_that_can_not_be_encoded_says_why_and_can_be_tried_again(model):
    engine = Engine.load(model, check=False, kv_budget=50 * serving.token_bytes())
    with client(engine) as http:
        body = {"id": "g", "segments": [{"id": n, "text": t} for n, t in TEXTS.items()], "edges": EDGES}
        post_graph(http, **body)
        failed = wait_ready(http, "g")
        assert failed["state"] == "failed" and "budget" in failed["error"]
        assert post_graph(http, **body)["state"] == "pending"
        assert wait_ready(http, "g")["state"] == "failed"


# tenants, restarts


def test_tenants_share_nothing(live):
    put(live, TEXTS)
    post_graph(live, id="island", segments=list(TEXTS), edges=EDGES)
    wait_ready(live, "island")
    with httpx.Client(base_url=live.base_url, headers=BOB) as bob:
        assert bob.get("/v1/segments").json()["data"] == bob.get("/v1/graphs").json()["data"] == []
        for path in ("segments/a", "graphs/island"):
            error(bob.get(f"/v1/{path}"), 404)
            error(bob.delete(f"/v1/{path}"), 404)
        ask(bob, 404, documents=[{"segment": "a"}])
        ask(bob, 404, kvgraph={"graph": "island"})
        error(bob.post("/v1/graphs", json={"segments": ["a"]}), 404)
        own = put(bob, {"a": TEXTS["a"], "b": "something else"})
        assert [s["computed_tokens"] for s in own] == [s["tokens"] for s in own], "another tenant's KV isn't found"
        drop(bob, "segments/a", "segments/b")
    assert live.get("/v1/segments/a").json()["tier"] == "memory", "nor removed"
    error(httpx.get(f"{live.base_url}/v1/segments"), 401)
    drop(live, "graphs/island", *(f"segments/{id}" for id in TEXTS))


def test_a_restart_on_the_same_store_computes_no_document_token(model, tmp_path):
    store = tmp_path / "kv"
    with client(model, store=store) as http:
        put(http, TEXTS)
        post_graph(http, id="island", segments=list(TEXTS), edges=EDGES)
        wait_ready(http, "island")
        before = ask(http, kvgraph={"graph": "island", "segments": ["c"]})
    with client(model, store=store) as http:
        assert http.get("/v1/graphs/island").json()["state"] == "ready"
        assert http.get("/v1/segments/a").json()["tier"] == "disk"
        after = ask(http, kvgraph={"graph": "island", "segments": ["c"]})
        assert after["usage"]["kvgraph"]["document_tokens_computed"] == 0
        assert set(after["usage"]["kvgraph"]["reused_tokens"]) == {"disk"}
        drop(http, "graphs/island", *(f"segments/{id}" for id in TEXTS))
    assert after["choices"] == before["choices"]
    report = DiskStore(store).verify()
    assert report.clean and report.foreign == []
    assert report.good == 0, "deleting took every record"


def test_a_graph_whose_server_is_stopped_at_once_is_finished_by_the_next(model, tmp_path):
    store, texts = tmp_path / "kv", {f"s{i}": f"text number {i} " * 8 for i in range(9)}
    with client(model, store=store) as http:
        post_graph(http, id="g", segments=[{"id": n, "text": t} for n, t in texts.items()], edges="chain")
    with client(model, store=store) as http:
        assert wait_ready(http, "g")["done"] == 9
        asked = ask(http, kvgraph={"graph": "g", "segments": ["s8"]})
        assert asked["usage"]["kvgraph"]["document_tokens_computed"] == 0


def test_an_unfinished_graph_goes_on_where_it_was(model, tmp_path):
    """The library says that two of three segments are done, though nothing is: so only the third is encoded."""
    engine = Engine.load(model, check=False, store=tmp_path)
    library = Library(tmp_path / "library.sqlite", engine.model.fingerprint)
    library.add("", [StoredSegment(n, tuple(engine.tokenize(t))) for n, t in TEXTS.items()], most=3)
    graph = library.add_graph("", "g", GraphKV(band=50), list(TEXTS), [(0, 1), (1, 2)], spans=3, tokens=1)
    library.progress(graph, "running", 2)
    library.close()
    with client(engine, store=tmp_path) as http:
        assert wait_ready(http, "g")["done"] == 3
        assert http.get("/v1/segments/b").json()["tier"] == "memory", "what c reads"
        assert http.get("/v1/segments/a").json()["tier"] is None, "what b reads"


# the library


def library_with_chain(n: int, folder: Path, **fields) -> tuple[Library, object]:
    library = Library(folder / "library.sqlite", "model")
    library.add("t", [StoredSegment(f"s{i}", tuple(range(i, i + 5))) for i in range(n)], most=n)
    method, edges = GraphKV(band=5, **fields), [(i, i + 1) for i in range(n - 1)]
    return library, library.add_graph("t", "g", method, [f"s{i}" for i in range(n)], edges, spans=1, tokens=1)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("layout", ["aligned", "tight"])
def test_a_part_of_a_graph_plans_what_the_whole_graph_plans(tmp_path, rounds, layout):
    library = Library(tmp_path / "library.sqlite", "model")
    library.add("t", [StoredSegment(f"s{i}", tuple(range(i, i + 1 + i % 4))) for i in range(9)], most=9)
    method = GraphKV(rounds, layout=layout, band=4 if layout == "aligned" else None)
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 2), (5, 2), (6, 5), (7, 7), (8, 0)]
    names = [f"s{i}" for i in range(9)]
    stored = library.add_graph("t", "g", method, names, edges, spans=1, tokens=1)
    whole = [tuple(range(i, i + 1 + i % 4)) for i in range(9)]
    for chosen in (["s4"], ["s2", "s0"], ["s7", "s3"], ["s6", "s1", "s8"], []):
        part = method.plan(library.part(stored, chosen).graph([1]))
        plan = method.plan(ContextGraph(whole, [1], edges=edges, names=names, chosen=chosen))

        def facts(plan):
            keys = dict(zip(plan.spans, plan.keys("m"), strict=True))
            return {keys[s] for s in plan.spans}, {(keys[plan.spans[p.span]], p.at) for p in plan.prompt.sees}

        assert facts(part) == facts(plan) and part.prompt.start == plan.prompt.start
    assert len(library.part(stored, ["s4"]).segments) == {1: 2, 2: 3, 3: 5}[rounds]


def test_a_request_over_a_large_corpus_reads_a_few_rows(tmp_path):
    library, graph = library_with_chain(10_000, tmp_path, rounds=2)
    started = time.perf_counter()
    parts = [library.part(graph, [f"s{i}"]) for i in range(5000, 5010)]
    assert (time.perf_counter() - started) / 10 < 0.05
    assert [s.id for s in parts[0].segments] == ["s5000", "s4999", "s4998"]


def test_a_library_belongs_to_one_model(tmp_path):
    library_with_chain(2, tmp_path)[0].close()
    other = Library(tmp_path / "library.sqlite", "another model")
    assert other.segments("t", "", 10) == other.graphs("t", "", 10) == other.unfinished() == []


@pytest.mark.parametrize("chosen", [None, ["s0"], [0]])
def test_a_graph_that_was_replaced_is_not_stored(tmp_path, chosen):
    library, graph = library_with_chain(3, tmp_path)
    library.replace_graph("t", "g", graph.method, [StoredSegment("new", (7,))], [], spans=1, tokens=1)
    with pytest.raises(NotStoredError):
        library.part(graph, chosen)


def test_a_damaged_library_is_said_so(tmp_path):
    file = tmp_path / "library.sqlite"
    file.write_bytes(b"no database at all " * 100)
    with pytest.raises(Exception, match=r"library\.sqlite can't be used .*move it away"):
        Library(file, "model")


def test_without_a_file_memory_serves(tmp_path, caplog):
    (tmp_path / "library.sqlite").mkdir()
    library = Library(tmp_path / "library.sqlite", "model")
    assert "they are lost when the server stops" in caplog.text
    library.add("t", [StoredSegment("a", (1, 2))], most=1)
    assert library.segment("t", "a").tokens == (1, 2)


def test_tenants_keep_so_many_segments(model):
    with client(model, max_segments=2) as http:
        put(http, {"a": "x", "b": "y"})
        assert "at most 2 are kept" in error(http.put("/v1/segments", json={"id": "c", "text": "z"}), 400)
    with pytest.raises(SettingsError, match="max_segments"), client(model, max_segments=0):
        pass


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_graphs": 2}, "there would be 3 graphs, but at most 2 are kept"),
        ({"max_tenant_edges": 8}, "would have 9 edges and segments, but at most 8 are kept"),
    ],
)
def test_tenants_keep_so_many_graphs(model, limit, message):
    with client(model, api_keys=KEYS, **limit) as http:
        http.headers.update(ALICE)
        put(http, {"a": "x", "b": "y"})
        graph = {"segments": ["a", "b"], "edges": [["a", "b"]]}
        for name in ("one", "two", "two"):  # the same again is none more
            post_graph(http, id=name, **graph)
        refused = http.post("/v1/graphs", json={"id": "three", **graph})
        assert message in error(refused, 400)
        assert [kept["id"] for kept in http.get("/v1/graphs").json()["data"]] == ["one", "two"]
        put(http, {"a": "x", "b": "y"}, **BOB)
        assert http.post("/v1/graphs", json={"id": "three", **graph}, headers=BOB).status_code == 202
        assert http.delete("/v1/graphs/one").status_code == 200
        post_graph(http, id="three", **graph)
