"""Graph-KV's four endpoints, asked as its published client asks, against what the original code answers (the oracle)."""

from __future__ import annotations

import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

import oracle
from kvgraph import Engine
from kvgraph.server.routes import compat
from serving import application, serve, serving
from soak import some

MODEL = oracle.folder() / "models" / "tiny_default"
ENDPOINTS = {
    "vanilla": "generate_vanilla",
    "block_server": "generate_block",
    "gapemp": "generate_gapemp",
    "gapemp_appr": "generate_gapemp_appr",
}
CASES = [c for c in oracle.cases() if c["method"] in ENDPOINTS and c["model"] == MODEL.name]
with_texts = pytest.mark.skipif(
    not {"prompt", "blocks", "contexts"} <= {name for c in CASES for name in c["inputs"]},
    reason=f"the recordings in {oracle.folder()} are without their texts; set KVGRAPH_ORACLE to the full set",
)
BLOCKS = ["Read.\n", "", "- Title: one\nA first text.\n", "- Title: two\nA second text.\n", "\n Question: Who? \n"]

CLIENT = httpx.Client(timeout=60)

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(MODEL, dtype="float32", kv_budget=1 << 28, check=False)


@pytest.fixture(scope="module")
def app(engine):
    return application(engine, document_template="{text}", max_documents=20)


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as url:
        yield url


def ask(url: str, endpoint: str, form: dict) -> httpx.Response:
    """As the client does: the form as JSON text, one header, no key."""
    headers = {"Content-Type": "application/json"}
    return CLIENT.post(f"{url}/{endpoint}", content=json.dumps(form), headers=headers)


def form_of(case: dict) -> dict:
    """What the client would send to get a recorded case: [prefix, middle, contexts..., query]."""
    given = case["inputs"]
    if case["method"] == "vanilla":
        start, middle, end = given["prompt"][:7], given["prompt"][7:9], given["prompt"][9:]
        return {"blocks": [start, middle, end]}
    if case["method"] == "block_server":
        prefix, *contexts = given["blocks"]
        local = given["num_local_attention_blocks"]
        blocks = [prefix, "ignored", *contexts, given["instruction"]]
        return {"blocks": blocks} | ({} if local == 10_000 else {"num_local_attention_blocks": local})
    blocks = [given["prefix"], given["middle"], *given["contexts"], given["query"]]
    return {"blocks": blocks} | ({"top_k": given["top_k"]} if case["method"] == "gapemp_appr" else {})


def test_every_endpoint_has_cases():
    assert {c["method"] for c in CASES} == set(ENDPOINTS)


@with_texts
@pytest.mark.parametrize("case", some(CASES, 10, turn=1), ids=lambda c: c["id"])
def test_answers_are_the_originals(url, engine, case):
    """The recordings end at eos, as answers do, or after 16 tokens. Asked twice: cold, and from stored KV."""
    expected = engine.detokenize(case["greedy"])
    form = form_of(case) | ({} if len(case["greedy"]) < 16 else {"max_new_tokens": 16})
    for _ in range(2):
        answer = ask(url, ENDPOINTS[case["method"]], form)
        assert (answer.status_code, answer.json()) == (200, {"ret": 0, "generated": expected, "message": ""})


@with_texts
def test_recordings_cover_what_is_special():
    """End tokens that end an answer, and end tokens inside a document, which is hidden from its readers."""
    assert any(len(c["greedy"]) < 16 for c in CASES)
    assert any(c["eos_id"] in d for c in CASES if c["method"] == "gapemp" for d in c["ids"]["docs"])


def test_answers_may_have_1024_tokens_unless_the_form_says_otherwise(url):
    schemas = CLIENT.get(f"{url}/openapi.json").json()["components"]["schemas"]
    for name in ("BlocksRequest", "LocalBlocksRequest", "TopKRequest"):
        assert schemas[name]["properties"]["max_new_tokens"]["default"] == 1024


@pytest.mark.parametrize(
    ("endpoint", "options", "method", "edges"),
    [
        ("generate_block", {}, "block", "none"),
        ("generate_gapemp", {}, "graph-kv-rag:drop_token=1", "all+self"),
        ("generate_gapemp_appr", {"top_k": 1}, "graph-kv-rag-top-k:drop_token=1", "last-k:1+self"),
    ],
)
def test_the_second_call_computes_no_document(url, endpoint, options, method, edges):
    """/v1/plan, asked for the same texts, tells where the KV of each span is: it is the KV that OpenAI's routes use."""
    prefix, _, *contexts, query = [f"{text}{endpoint}" if text else text for text in BLOCKS]
    body = {
        "model": MODEL.name,
        "prompt": query,
        "documents": [{"text": text} for text in contexts],
        "kvgraph": {"method": method, "edges": edges, "prefix": prefix},
    }

    def tiers() -> set[str | None]:
        plan = CLIENT.post(f"{url}/v1/plan", json=body).raise_for_status().json()
        return {span["tier"] for span in plan["spans"] if span["cached"]}

    form = {"blocks": [prefix, "", *contexts, query], "max_new_tokens": 8} | options
    assert tiers() == {None}
    first = ask(url, endpoint, form).json()
    assert tiers() == {"memory"}
    assert ask(url, endpoint, form).json() == first


def test_only_vanilla_reads_the_middle(url):
    other = [BLOCKS[0], "Something else.\n", *BLOCKS[2:]]
    for endpoint in ENDPOINTS.values():
        answers = [
            ask(url, endpoint, {"blocks": blocks, "top_k": 1, "max_new_tokens": 12}).json()
            for blocks in (BLOCKS, other)
        ]
        assert (answers[0] == answers[1]) == (endpoint != "generate_vanilla")


@pytest.mark.parametrize("endpoint", ENDPOINTS.values())
def test_blocks_may_be_empty_and_unknown_fields_are_ignored(url, endpoint):
    """Where the original fails: no context at all, and contexts without text."""
    for contexts in ([], ["", "- Title: one\nA text.\n"]):
        form = {"blocks": ["", "", *contexts, "Who?"], "top_k": 2, "max_new_tokens": 4, "temperature": "hot"}
        answer = ask(url, endpoint, form)
        assert (answer.status_code, answer.json()["ret"]) == (200, 0)


HOSTILE = {
    "nothing": ({}, "blocks"),
    "no list": ({"blocks": "text"}, "blocks"),
    "too few": ({"blocks": ["prefix", "query"]}, "blocks"),
    "no texts": ({"blocks": ["a", "", 7, "b"]}, "blocks.2"),
    "null": ({"blocks": ["a", "", None, "b"]}, "blocks.2"),
    "half a character": ({"blocks": ["a", "", "\ud800", "b"]}, None),
    "empty query": ({"blocks": ["", "", ""]}, None),
    "many": ({"blocks": ["a", "", *["context"] * 21, "b"]}, "blocks"),
    "long": ({"blocks": ["a", "", "word " * 20_000, "b"]}, None),
    "top_k -1": ({"top_k": -1}, "top_k"),
    "top_k text": ({"top_k": "3"}, "top_k"),
    "top_k 1.5": ({"top_k": 1.5}, "top_k"),
    "top_k NaN": ({"top_k": float("nan")}, "top_k"),
    "top_k true": ({"top_k": True}, "top_k"),
    "top_k null": ({"top_k": None}, "top_k"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens"),
    "all tokens": ({"max_new_tokens": 10**30}, "max_new_tokens"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_get_a_clear_refusal(url, name):
    """The published client looks at the status and, if it is 200, for "generated": it leaves such an item unanswered."""
    form, field = HOSTILE[name]
    if "blocks" not in form and form:
        form = {"blocks": BLOCKS} | form
    answer = ask(url, "generate_gapemp_appr", {"top_k": 3} | form)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["param"] == field


def test_edges_are_counted_before_they_are_made(engine, monkeypatch):
    forms = {"generate_gapemp": {}, "generate_gapemp_appr": {"top_k": 9}}
    with serve(engine, max_edges=81) as url:

        def asked(endpoint: str, contexts: int) -> httpx.Response:
            form = {"blocks": ["", "", *["a"] * contexts, "b"], "max_new_tokens": 1} | forms[endpoint]
            return ask(url, endpoint, form)

        for endpoint in forms:
            assert asked(endpoint, 9).status_code == 200
        for name in ("all_pairs", "top_k"):
            monkeypatch.setattr(compat, name, None)
        for endpoint, edges in {"generate_gapemp": 100, "generate_gapemp_appr": 90}.items():
            refused = asked(endpoint, 10)
            assert refused.status_code == 400
            assert refused.json()["error"]["message"] == f"{edges} edges, but at most 81 are taken"


def test_top_k_must_be_given_and_blocks_counted_from_none(url):
    answer = ask(url, "generate_gapemp_appr", {"blocks": BLOCKS})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_k")
    answer = ask(url, "generate_block", {"blocks": BLOCKS, "num_local_attention_blocks": -1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "num_local_attention_blocks")
    assert CLIENT.get(f"{url}/generate_block").status_code == 405


@pytest.mark.parametrize("content", [b"", b"{", b'{"blocks": ["\xff"]}', b"[" * 100_000, b"null", b'"blocks"'])
def test_bodies_that_are_no_form(url, content):
    answer = CLIENT.post(f"{url}/generate_gapemp", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_client_that_leaves_ends_the_work(app, url):
    """With nobody to read it, the answer isn't decoded to its end."""
    runner = app.state.server.runner
    body = json.dumps({"blocks": [*BLOCKS[:-1], "\n Question: When? \n"]}).encode()  # rambles for 1024 tokens
    head = f"POST /generate_vanilla HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    steps, address = runner.steps, urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(head.encode() + body)
        while runner.steps < steps + 5:
            time.sleep(0.001)
        assert runner.pending == 1
    deadline = time.monotonic() + 30
    while runner.pending:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert runner.steps < steps + 1000


def test_keys_and_tenants():
    """Servers with keys want one here too, and one tenant's contexts are nothing to another."""
    keys = [{"key": "first-key", "tenant": "a"}, {"key": "second-key", "tenant": "b"}]
    body = {
        "model": MODEL.name,
        "prompt": BLOCKS[-1],
        "documents": [{"text": text} for text in BLOCKS[2:-1]],
        "kvgraph": {"method": "block", "prefix": BLOCKS[0]},
    }
    with serve(MODEL, api_keys=keys, document_template="{text}") as url:
        form = {"blocks": BLOCKS, "max_new_tokens": 2}
        assert ask(url, "generate_block", form).status_code == 401
        first, second = ({"Authorization": f"Bearer {key['key']}"} for key in keys)
        assert CLIENT.post(f"{url}/generate_block", json=form | {"tenant": "b"}, headers=first).status_code == 200
        for headers, tier in ((first, "memory"), (second, None)):
            plan = CLIENT.post(f"{url}/v1/plan", json=body, headers=headers).raise_for_status().json()
            assert {span["tier"] for span in plan["spans"] if span["cached"]} == {tier}
