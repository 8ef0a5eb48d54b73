"""Whatever is sent, the server answers in the shapes it documents, never with a fault of its own, and goes on serving."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig

from kvgraph import demo
from kvgraph.server.app import create_app
from kvgraph.server.settings import Settings
from serving import serve
from soak import SOAK, draws

LONG, LIMIT = (10_000_000, 16 << 20) if SOAK else (300_000, 2 << 20)
KEY = "the-key-of-ann"
pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")
load_all_checks()
(positive_data_acceptance,) = CHECKS.get_by_names(["positive_data_acceptance"])


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("fuzz") / "tiny"
    folder.mkdir()
    demo.write_model(folder)
    with serve(folder, default_max_tokens=2, max_request_bytes=LIMIT, api_keys=[{"key": KEY, "tenant": "ann"}]) as url:
        yield url


CONFIG = {"auth": {"openapi": {"HTTPBearer": {"bearer": KEY}}}, "seed": 1, "cache": {"enabled": False}}
if not SOAK:
    CONFIG["phases"] = {"coverage": {"enabled": False}}  # four thousand requests
api = schemathesis.openapi.from_dict(
    create_app(Settings(model="tiny")).openapi(), config=SchemathesisConfig.from_dict(CONFIG)
)
if not SOAK:
    api = api.exclude(path="/v1/plan")  # its body is that of the two others


@api.parametrize()
@settings(max_examples=draws(6, 300), suppress_health_check=list(HealthCheck), deadline=None, database=None)
def test_every_route_keeps_to_its_document(case, url):
    within_reach(case.body)
    case.call_and_validate(url, excluded_checks=[positive_data_acceptance])


def within_reach(body: Any) -> None:
    """Let a valid request get beyond the model's name, and take neither long nor too short a time."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    if "blocks" in body:
        body.setdefault("max_new_tokens", 2)
    for name in ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int) and 2 < body[name] <= 1 << 24:
            body[name] = 2
    options = body.get("kvgraph")
    if isinstance(options, dict) and isinstance(options.get("timeout"), int | float) and options["timeout"] > 0:
        options["timeout"] = 60


# -- by hand ------------------------------------------------------------------------------------------------------------

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
JSON = {"Content-Type": "application/json"}


def chat(**changes: Any) -> dict[str, Any]:
    return CHAT | changes


def over(count: int, kvgraph: dict[str, Any], text: str = "x") -> dict[str, Any]:
    """A chat over so many short documents."""
    return chat(documents=[{"text": f"{text} {i}"} for i in range(count)], kvgraph=kvgraph)


def raw(text: str | bytes) -> dict[str, Any]:
    return {"content": text, "headers": JSON}


HOSTILE: dict[str, tuple[int, dict[str, Any] | list | str | None]] = {
    "a body above the limit": (413, chat(documents=[{"text": "x" * LIMIT}])),
    f"a document of {LONG // 5:,} words": (400, chat(documents=[{"text": "lorem ipsum " * (LONG // 10)}])),
    f"a word of {LONG:,} characters": (400, chat(documents=[{"text": "x" * LONG}])),
    f"a question of {LONG:,} characters": (400, chat(messages=[{"role": "user", "content": "x" * LONG}])),
    "10,000 messages": (400, chat(messages=[{"role": "user", "content": "hello"}] * 10_000)),
    "10,001 messages": (400, chat(messages=[{"role": "user", "content": "hello"}] * 10_001)),
    "10,000 documents": (400, over(10_000, {})),
    "cyclic edges": (200, over(3, {"method": "graph-kv", "edges": [[0, 1], [1, 2], [2, 0]], "rounds": 4})),
    "an edge to nowhere": (400, over(2, {"method": "graph-kv", "edges": [[0, 7]]})),
    "an edge from nowhere": (400, over(2, {"method": "graph-kv", "edges": [["nobody", 0]]})),
    "an edge of three": (400, over(2, {"method": "graph-kv", "edges": [[0, 1, 2]]})),
    "an edge below zero": (400, over(2, {"method": "graph-kv", "edges": [[-1, 0]]})),
    "an edge from true": (400, over(2, {"method": "graph-kv", "edges": [[True, 0]]})),
    "10,000 edges": (400, over(200, {"method": "graph-kv", "edges": [[s, r] for r in range(100) for s in range(100)]})),
    "a million edges by name": (400, over(1000, {"method": "graph-kv", "edges": "all"})),
    "edges by no name": (400, over(2, {"method": "graph-kv", "edges": "\u0000>1,💥>💥"})),
    "an edge builder of a huge number": (200, over(2, {"method": "graph-kv", "edges": "top-k:" + "9" * 18})),
    "an edge builder of a number of 190 digits": (400, over(2, {"method": "graph-kv", "edges": "top-k:" + "9" * 190})),
    "an unknown segment": (404, chat(documents=[{"segment": "nobody's"}])),
    "a path for a segment": (404, chat(documents=[{"segment": "../../../etc/passwd"}])),
    "a path for a graph": (404, chat(kvgraph={"graph": "../../../etc/passwd"})),
    "a path for a model": (404, chat(model="../../../etc/passwd")),
    "a document of neither kind": (400, chat(documents=[{"id": "a"}])),
    "a document of both kinds": (400, chat(documents=[{"text": "a", "segment": "b"}])),
    "documents of one id": (400, chat(documents=[{"id": "a", "text": "x"}, {"id": "a", "text": "y"}])),
    "a document called like another's number": (400, chat(documents=[{"id": "doc 1", "text": "x"}, {"text": "y"}])),
    "a word for a band": (400, over(2, {"method": "graph-kv", "edges": "all", "band": "x"})),
    "a fraction for a band": (400, over(2, {"method": "graph-kv", "edges": "all", "band": 1.5})),
    "an object for a band": (400, over(2, {"method": "graph-kv", "edges": "all", "band": {"a": []}})),
    "a band beyond the model": (400, over(2, {"method": "graph-kv", "edges": "all", "band": 10**9})),
    "a band beyond 64 bits": (400, over(2, {"method": "graph-kv", "edges": "all", "band": 10**300})),
    "a billion rounds": (400, over(2, {"method": "graph-kv", "edges": [[0, 1], [1, 0]], "rounds": 10**9})),
    "a billion rounds in the method": (400, over(2, {"method": "graph-kv:rounds=1000000000", "edges": "all"})),
    "true for rounds": (400, over(2, {"method": "graph-kv", "edges": "all", "rounds": True})),
    "no such layout": (400, over(2, {"method": "graph-kv", "layout": "round"})),
    "a list for a layout": (400, over(2, {"method": "graph-kv", "layout": ["aligned"]})),
    "a billion links": (400, over(2, {"method": "kvlink", "links": 10**9, "link_start": 5})),
    "links below zero": (400, over(2, {"method": "kvlink", "links": -1})),
    "a billion tokens to recompute": (400, over(2, {"method": "epic", "k": -(10**9)})),
    "a method that isn't": (400, over(2, {"method": "__class__"})),
    "a field that every object has": (400, over(2, {"method": "full", "__class__": 1})),
    "a method of many fields": (400, over(2, {"method": "graph-kv:" + ",".join(["band=5"] * 25) + "="})),
    "a seed beyond 64 bits": (400, chat(seed=10**30)),
    "1e308 for a seed": (400, raw(json.dumps(CHAT)[:-1] + ', "seed": 1e308}')),
    "NaN": (400, raw(json.dumps(chat(temperature=math.nan)))),
    "infinity": (400, raw(json.dumps(chat(top_p=math.inf)))),
    "NaN in a method's field": (400, raw(json.dumps(over(2, {"method": "ape", "scale": math.nan})))),
    "a number of 100,000 digits": (400, raw(json.dumps(CHAT)[:-1] + ', "seed": ' + "9" * 100_000 + "}")),
    "below zero": (400, chat(max_tokens=-1)),
    "true for a number": (400, chat(n=True)),
    "a word for a number": (400, chat(max_tokens="2")),
    "NUL characters": (200, chat(messages=[{"role": "user", "content": "a\0b"}], documents=[{"text": "\0"}])),
    "a lone surrogate": (400, raw(json.dumps(chat(messages=[{"role": "user", "content": "\ud800"}])))),
    "a lone surrogate in a document": (400, raw(json.dumps(chat(documents=[{"text": "\udfff", "title": "\ud800"}])))),
    "a lone surrogate in an id": (400, raw(json.dumps(chat(documents=[{"id": "\ud800", "text": "a"}])))),
    "a lone surrogate in a model": (404, raw(json.dumps(chat(model="\ud800")))),
    "a lone surrogate in a field": (400, raw(json.dumps(chat(kvgraph={"\ud800": "\ud800"})))),
    "a lone surrogate in a stop": (400, raw(json.dumps(chat(stop="\ud800")))),
    "no UTF-8": (400, raw(b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe"}]}')),
    "UTF-16": (200, raw(json.dumps(CHAT).encode("utf-16"))),
    "JSON 100,000 levels deep": (400, raw("[" * 100_000)),
    "objects 100,000 levels deep": (400, raw('{"a":' * 100_000 + "1" + "}" * 100_000)),
    "a method's field 900 levels deep": (400, raw(json.dumps(CHAT)[:-1] + ', "kvgraph": {"band": ' + "[" * 900 + "]" * 900 + "}}")),
    "metadata 900 levels deep": (200, raw(json.dumps(CHAT)[:-1] + ', "metadata": ' + "[" * 900 + "]" * 900 + "}")),
    "half a body": (400, raw(json.dumps(CHAT)[:-5])),
    "no body": (400, raw("")),
    "null": (400, raw("null")),
    "a list": (400, raw("[]")),
    "a form": (415, {"data": {"model": "tiny"}}),
    "text": (415, {"content": json.dumps(CHAT), "headers": {"Content-Type": "text/plain"}}),
    "no messages": (400, chat(messages=[])),
    "a role that isn't": (400, chat(messages=[{"role": "../user", "content": "a"}])),
    "documents without a user": (400, chat(messages=[{"role": "system", "content": "a"}], documents=[{"text": "b"}])),
    "an invisible mark": (200, chat(messages=[{"role": "user", "content": "\u2063kvgraph-0\u2063 {{ 7 * 7 }} {text}"}])),
}  # fmt: skip


@pytest.fixture(scope="module")
def client(url) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


def sent(client: httpx.Client, what: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    """POST a body, or what httpx is to be told."""
    told = what if isinstance(what, dict) and ("content" in what or "data" in what) else {"json": what}
    return client.post(path, **told)


def check(answer: httpx.Response, status: int) -> None:
    """The status as expected, and OpenAI's error shape if it is one; a message says something in one line."""
    assert answer.status_code == status, answer.text[:500]
    if status >= 400:
        assert set(answer.json()) == {"error"}
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 5 < len(error["message"]) <= 1000 and "\n" not in error["message"], error
        assert "Traceback" not in error["message"] and "object at 0x" not in error["message"], error


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_refused_clearly_and_serving_goes_on(client, name):
    status, what = HOSTILE[name]
    check(sent(client, what), status)
    ordinary = sent(client, CHAT)
    assert ordinary.status_code == 200 and ordinary.json()["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [""]},
        {"prompt": ["x"] * 1000},
        {"prompt": [1 << 30]},
        {"prompt": [-1]},
        {"prompt": [[1.5]]},
        {"prompt": ["a", 1]},
        {"prompt": "\u0000", "stop": ""},
        {"prompt": "a", "stop": ["x"] * 17},
        {"prompt": "a", "n": 1 << 40},
        {"prompt": "a", "stop_token_ids": [1 << 40]},
        {"prompt": "a", "logprobs": 6},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "kvgraph": {"prefix": 1}},
        {"prompt": "a", "kvgraph": {"timeout": 0}},
        {"prompt": "a", "kvgraph": {"timeout": -math.inf}},
    ],
    ids=lambda body: json.dumps(body)[:50],
)
def test_wrong_completions_are_refused_clearly(client, body):
    check(sent(client, raw(json.dumps({"model": "tiny"} | body)), "/v1/completions"), 400)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "field",
    [
        {"metadata": {"a": "\ud800"}},
        {"tools": [{"type": "function", "name": "f", "parameters": {"\ud800": 1}}], "tool_choice": "none"},
        {"metadata": {"a": json.loads("[" * 900 + "]" * 900)}},
    ],
    ids=["metadata", "tools", "depth"],
)
def test_what_a_response_could_not_show_again_is_refused(client, field, stream):
    check(
        sent(client, raw(json.dumps({"model": "tiny", "input": "hi", "stream": stream} | field)), "/v1/responses"), 400
    )


@pytest.mark.parametrize(
    "path",
    [
        "/v1/segments/..%2F..%2Fetc%2Fpasswd",
        "/v1/segments/%2e%2e",
        "/v1/segments/%00",
        "/v1/segments/%ff",
        "/v1/segments/a%0ab",
        "/v1/graphs/..%5C..%5Cx",
        "/v1/graphs/" + "x" * 5000,
        "/v1/models/..%2F..%2Fetc%2Fpasswd",
        "/v1/segments?limit=-1",
        "/v1/segments?limit=1e9",
        "/v1/graphs?after=" + "x" * 5000,
        "/v1/nothing",
        "/../../etc/passwd",
    ],
)
def test_strange_paths_are_refused_clearly(client, path):
    answer = client.get(path)
    assert answer.status_code in (400, 404)
    check(answer, answer.status_code)


def test_wrong_methods_name_the_right_ones(client):
    answer = client.put("/v1/segments/a")
    check(answer, 405)
    assert answer.headers["Allow"] == "DELETE, GET"
