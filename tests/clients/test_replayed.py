"""Requests of clients that aren't installed here, as their sources send them, and what those clients look for in the answer.

`vllm bench serve`: vllm/benchmarks/lib/endpoint_request_func.py of vllm-project/vllm. Open WebUI:
backend/open_webui/routers/openai.py, routers/tasks.py and utils/payload.py of open-webui/open-webui. Read in November 2026.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest


def streamed(server, path: str, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    """The data of a stream, read as `vllm bench serve` does: messages end at an empty line, comments are left out."""
    answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    messages = [m.strip() for m in answer.text.split("\n\n") if m.strip() and not m.startswith(":")]
    assert messages[-1] == "data: [DONE]"
    return [json.loads(message.removeprefix("data: ")) for message in messages[:-1]]


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("prompt", ["A ship", [5, 6, 7]], ids=["text", "ids"])
def test_vllm_bench_serve_completions(server, prompt, logprobs):
    body = {
        "model": server.name, "prompt": prompt, "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": logprobs,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0,
    }  # fmt: skip
    chunks = streamed(server, "/v1/completions", body, **{"x-request-id": "bench-0"})
    plain = {name: value for name, value in body.items() if not name.startswith("stream")}
    whole = httpx.post(f"{server.url}/v1/completions", json=plain, timeout=60).json()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-1]["usage"]["completion_tokens"] == 6 and not chunks[-1]["choices"]
    assert isinstance(chunks[-1]["usage"]["prompt_tokens"], int)


def test_vllm_bench_serve_chats(server):
    body = {
        "model": server.name, "messages": [{"role": "user", "content": [{"type": "text", "text": "Name a ship."}]}],
        "max_completion_tokens": 6, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    chunks = streamed(server, "/v1/chat/completions", body)
    assert all("delta" in chunk["choices"][0] for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == 6 and not chunks[-1]["choices"]


@pytest.mark.parametrize("route", ["/health", "/v1/models", "/metrics"])
def test_vllm_bench_serve_looks_around(server, route):
    assert httpx.get(f"{server.url}{route}").status_code == 200


def test_open_webui_lists_models(server):
    (model,) = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer none"}).json()["data"]
    assert model["id"] == server.name and model["object"] == "model"


CHAT = {
    "stream": True,
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a ship."}],
}
PARAMETERS = {
    "temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "max_tokens": 6, "frequency_penalty": 0.1, "presence_penalty": 0.1,
    "seed": 3, "stop": ["\n\n\n"], "logit_bias": {"5": -1}, "top_k": 40, "repeat_penalty": 1.1,
}  # fmt: skip


@pytest.mark.parametrize(
    "more", [{}, {"stream_options": {"include_usage": True}}, PARAMETERS], ids=["plain", "usage", "set"]
)
def test_open_webui_chats(server, more):
    body = {"model": server.name, "max_tokens": 6, **CHAT, **more}
    chunks = streamed(server, "/v1/chat/completions", body, Authorization="Bearer none")
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    told = [chunk for chunk in chunks if chunk.get("usage")]
    assert len(told) == ("stream_options" in more)


def test_open_webui_sends_the_conversation_back(server):
    first = httpx.post(
        f"{server.url}/v1/chat/completions", json={"model": server.name, "max_tokens": 4, **CHAT, "stream": False}
    )
    said = [*CHAT["messages"], first.json()["choices"][0]["message"], {"role": "user", "content": "Another?"}]
    body = {"model": server.name, "max_tokens": 4, **CHAT, "messages": said, "stream_options": {"include_usage": True}}
    assert streamed(server, "/v1/chat/completions", body)[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_open_webui_asks_for_titles(server):
    body = {
        "model": server.name,
        "messages": [{"role": "user", "content": "Title this."}],
        "stream": False,
        "max_tokens": 10,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    assert isinstance(answer["choices"][0]["message"]["content"], str)


def test_open_webui_over_responses(server):
    """A connection of type "responses" sends items instead of messages."""
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Name a ship."}]}]
    body = {"model": server.name, "input": items, "instructions": "Be brief.", "stream": True}
    answer = httpx.post(f"{server.url}/v1/responses", json={**body, "max_output_tokens": 4}, timeout=60)
    assert answer.status_code == 200 and "event: response.output_text.delta" in answer.text
