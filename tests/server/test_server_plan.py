"""POST /v1/plan: what it tells of a request, against the plan that the request then runs."""

import json

import httpx
import pytest

from kvgraph import demo
from kvgraph.engine import probe
from kvgraph.methods import METHODS
from serving import serve

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")

KEYS = [{"key": "key-of-alice", "tenant": "alice"}, {"key": "key-of-bob", "tenant": "bob"}]
DOCUMENTS = [{"id": "a", "title": "A", "text": "first"}, {"text": "second"}, {"id": "c", "text": "third"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    demo.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def url(model):
    with serve(model) as url:
        yield url


def chat(documents=DOCUMENTS, system="Be brief.", **kvgraph):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Why?"}]
    return {"model": "tiny", "messages": messages, "documents": documents, "kvgraph": kvgraph, "max_tokens": 2}


def post(url, path, body, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/v1/{path}", json=body, headers=headers, timeout=30)


def plan(url, body, key=None):
    answer = post(url, "plan", body, key)
    assert answer.status_code == 200, answer.text
    return answer.json()


def usage(url, body, key=None):
    answer = post(url, "chat/completions", body, key)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["kvgraph"]


def test_it_says_who_reads_whom_and_where(url):
    shown = plan(url, chat(method="graph-kv", edges=[["a", 1], [1, "c"]], rounds=2))
    assert shown["method"] == "graph-kv" and shown["segments"] == ["a", "doc 1", "c"]
    assert shown["edges"] == [[0, 1], [1, 2]]
    system, turn, *versions, live = shown["spans"]  # what stands before the documents: a piece a message
    assert all(s["segment"] is None and s["cached"] for s in (system, turn))
    assert [view["span"] for view in turn["sees"]] == [system["index"]]
    assert not live["cached"] and live["tier"] is None
    # Round 1 made new versions of segments 1 and 2, round 2 of segment 2 alone, whose source had changed.
    assert [(v["segment"], v["round"]) for v in versions] == [(0, 0), (1, 1), (2, 2)]
    first, second, third = versions
    assert first["sees"] == []
    assert second["sees"] == [{"span": first["index"], "at": first["start"], "lo": 0, "hi": first["tokens"]}]
    assert third["sees"] == [{"span": second["index"], "at": second["start"], "lo": 0, "hi": second["tokens"]}]
    for span in shown["spans"]:
        ((begin, end),) = span["positions"]
        assert begin == span["start"] and end - begin + 1 == span["tokens"]
    assert shown["highest_position"] == live["positions"][0][1]


def test_names_of_edges_come_back_resolved(url):
    assert plan(url, chat(method="graph-kv", edges="chain"))["edges"] == [[0, 1], [1, 2]]
    assert plan(url, chat(method="graph-kv", edges="star:2"))["edges"] == [[0, 2], [1, 2]]


def test_positions_with_gaps_are_runs(url):
    shown = plan(url, chat(method="kvlink", links=2, link_start=1))
    live = shown["spans"][-1]
    assert len(live["positions"]) == 3  # two links after each document; the last ones touch the question
    assert [b - a + 1 for a, b in live["positions"][:2]] == [2, 2]
    assert sum(b - a + 1 for a, b in live["positions"]) == live["tokens"]


def test_tiers_follow_what_happens_and_looking_changes_nothing(model, tmp_path):
    body = chat(method="graph-kv", edges="chain")
    with serve(model, store=tmp_path / "kv") as url:
        assert [s["tier"] for s in plan(url, body)["spans"]] == [None] * 7
        assert [s["tier"] for s in plan(url, body)["spans"]] == [None] * 7  # looking encodes nothing
        cold = usage(url, body)
        shown = plan(url, body)
        assert [s["tier"] for s in shown["spans"]] == ["memory"] * 6 + [None]
        assert sum(s["tokens"] for s in shown["spans"][:-1]) == cold["document_tokens_computed"]
    with serve(model, store=tmp_path / "kv") as url:
        assert [s["tier"] for s in plan(url, body)["spans"]] == ["disk"] * 6 + [None]
        assert [s["tier"] for s in plan(url, body)["spans"]] == ["disk"] * 6 + [None]  # and fetches nothing
        warm = usage(url, body)
        assert warm["document_tokens_computed"] == 0 and set(warm["reused_tokens"]) == {"disk"}
        assert [s["tier"] for s in plan(url, body)["spans"]] == ["memory"] * 6 + [None]


def test_a_tenant_sees_its_own_hits_alone(model):
    with serve(model, api_keys=KEYS) as url:
        usage(url, chat(), "key-of-alice")
        assert {s["tier"] for s in plan(url, chat(), "key-of-alice")["spans"] if s["cached"]} == {"memory"}
        assert {s["tier"] for s in plan(url, chat(), "key-of-bob")["spans"] if s["cached"]} == {None}
        assert post(url, "plan", chat()).status_code == 401


@pytest.mark.parametrize("method", METHODS)
def test_every_method_shows_the_versions_of_every_document(url, method):
    documents = [{"text": f"document {i}, which is longer than what epic recomputes"} for i in range(3)]
    shown = plan(url, chat(documents, method=method))
    assert {s["segment"] for s in shown["spans"] if s["cached"]} == {None, 0, 1, 2}


@pytest.mark.parametrize("name", ["prefix", "query", "prefix 0", "b · round 1", "<b>\n"])
def test_a_document_may_be_named_like_something_else(url, name):
    documents = [{"id": "b", "text": "one"}, {"id": name, "text": "another"}]
    shown = plan(url, chat(documents, method="graph-kv", edges=[[1, 0], [0, 1]]))
    cached = [(s["segment"], s["round"]) for s in shown["spans"] if s["cached"]]
    assert cached == [(None, None)] * 2 + [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_a_completion_has_a_plan_too(url):
    body = {"model": "tiny", "prompt": "Why?", "documents": DOCUMENTS, "kvgraph": {"prefix": "Facts:\n"}}
    shown = plan(url, body)
    assert [s["segment"] for s in shown["spans"]] == [None, 0, 1, 2, None]
    assert shown["method"] == "full"
    refused = post(url, "plan", {**body, "prompt": ["Why?", "When?"]})
    assert refused.status_code == 400 and "one at a time" in refused.text


def test_documents_that_dont_fit_are_told(model):
    documents = [{"id": f"d{i}", "text": "x" * 20_000} for i in range(3)]
    with serve(model, overflow="drop") as url:
        shown = plan(url, chat(documents))
        assert shown["segments"] == ["d0"] and shown["dropped"] == ["d1", "d2"]


def test_a_prompt_without_room_for_its_answer_is_not_probed(url, monkeypatch):
    probed = []
    monkeypatch.setattr(probe, "deviations", lambda *problem: (probed.append(problem), ([], 0))[1])
    answer = post(url, "plan", {**chat(method="cacheblend"), "max_tokens": 1 << 20})
    assert answer.status_code == 400 and "ask for fewer tokens" in answer.json()["error"]["message"]
    assert not probed


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"model": "tiny"}, "messages"),
        ({"model": "tiny", "prompt": 5}, "prompt"),
        ([], ""),
        (chat(salt="alice"), "salt"),
        (chat(method="nonsense"), "no method 'nonsense'"),
        (chat(method="full", edges="chain"), "full ignores edges"),
        (chat(method="graph-kv", edges=[[0, 7]]), "there is no segment 7"),
        (chat([{"text": "x"}] * 64, method="graph-kv", edges="all+self", rounds=1000), "use fewer rounds or edges"),
    ],
)
def test_what_cant_be_planned_is_refused_in_one_line(url, body, told):
    answer = post(url, "plan", body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"], json.dumps(answer.json())
