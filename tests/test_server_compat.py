"""Graph-KV's four endpoints, asked as its published client asks, against what the original code answers (the oracle)."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from transformers import AutoTokenizer

import oracle
from kvgraph import Engine
from kvgraph.server.settings import Settings
from serving import application, serve, serving

MODEL = oracle.folder() / "models" / "tiny_default"
ENDPOINTS = {
    "vanilla": "generate_vanilla",
    "block_server": "generate_block",
    "gapemp": "generate_gapemp",
    "gapemp_appr": "generate_gapemp_appr",
}
CASES = [c for c in oracle.cases() if c["model"] == MODEL.name and c["method"] in ENDPOINTS]
BLOCKS = ["Read.\n", "", "- Title: one\nA first text.\n", "- Title: two\nA second text.\n", "\n Question: Who? \n"]

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(MODEL, dtype="float32", kv_budget=1 << 28, check=False)


@pytest.fixture(scope="module")
def app(engine):
    return application(engine, document_template="{text}", max_documents=300)


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as url:
        yield url


def ask(url: str, endpoint: str, form: dict) -> httpx.Response:
    """As the client does: the form as JSON text, one header, no key."""
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{url}/{endpoint}", content=json.dumps(form), headers=headers, timeout=60)


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


@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_answers_are_the_originals(url, case):
    """The recordings stop after 16 tokens, or at eos."""
    form = form_of(case) | {"max_new_tokens": 16}
    for _ in range(2):  # cold and warm
        answer = ask(url, ENDPOINTS[case["method"]], form)
        assert answer.status_code == 200, answer.text
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        expected = tokenizer.decode(case["greedy"], skip_special_tokens=True)
        assert answer.json() == {"ret": 0, "generated": expected, "message": ""}
