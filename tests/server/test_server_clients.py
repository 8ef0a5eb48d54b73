"""What clients of OpenAI-compatible servers send, and what they get: taken, refused with the field's name, or reported."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvgraph import Engine, demo
from serving import Live, application, error, events, serving

PHI = (
    "{% for m in messages %}{% if m.role == 'system' and m.content %}<|system|>\n{{ m.content }}<|end|>\n"
    "{% elif m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n"
    "{% elif m.role == 'assistant' %}<|assistant|>\n{{ m.reasoning_content or '' }}{{ m.content }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yo"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model with a chat template that ends conversations as Phi-4-mini's does."""
    made = tmp_path_factory.mktemp("clients") / "tiny"
    made.mkdir()
    demo.write_model(made)
    path = made / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": PHI}))
    return made


def chat(server: Live, status: int = 200, **more: Any) -> Any:
    """The answer to a chat of one message, unless told otherwise; of an error, what it says."""
    body = {"model": server.name, "messages": [USER], "max_tokens": 3, "temperature": 0, **more}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def text(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]


# -- messages ---------------------------------------------------------------------------------------------------------

SENT_BACK: dict[str, dict[str, Any]] = {
    "a dump of an answer": {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None},
    "empty lists": {"tool_calls": [], "annotations": []},
    "parsed": {"parsed": None, "refusal": ""},
    "a type": {"type": "message", "id": "msg_1", "status": "completed"},
    "annotations": {"annotations": [{"type": "url_citation"}]},
}  # fmt: skip


@pytest.mark.parametrize("more", SENT_BACK.values(), ids=SENT_BACK)
def test_history_is_taken_as_clients_send_it(server, more):
    plain = chat(server, messages=[USER, ANSWER, USER])
    sent = chat(server, messages=[USER, ANSWER | more, USER | {"type": "text"}])
    assert text(sent) == text(plain) and sent["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert "ignored" not in sent["usage"]["kvgraph"]


def test_an_answer_can_be_sent_back_as_it_came(server):
    answer = chat(server)["choices"][0]["message"]
    chat(server, messages=[USER, answer, USER])


def test_thoughts_go_to_the_template(server):
    thoughts = ANSWER | {"reasoning_content": "Hm."}
    with_them = chat(server, messages=[USER, thoughts, USER])["usage"]["prompt_tokens"]
    assert with_them == chat(server, messages=[USER, ANSWER, USER])["usage"]["prompt_tokens"] + len("Hm.")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
        ({"audio": {"id": "a"}}, "audio"),
    ],
)
def test_history_that_would_change_the_answer_is_refused(server, message, param):
    told = chat(server, 400, messages=[USER, ANSWER | message, USER])
    assert (told["param"], told["code"]) == (f"messages.1.{param}", "unsupported_parameter")
    assert told["message"].startswith(f"messages.1.{param} isn't supported")


def test_a_developer_is_the_system_to_a_template_without_one(server):
    system = chat(server, messages=[{"role": "system", "content": "Be brief"}, USER])
    developer = chat(server, messages=[{"role": "developer", "content": "Be brief"}, USER])
    assert developer["usage"]["prompt_tokens"] == system["usage"]["prompt_tokens"]
    assert developer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_message_that_would_vanish_is_refused(server):
    told = chat(server, 400, messages=[USER, {"role": "tool", "content": "Hi", "tool_call_id": "c"}, USER])
    assert "leaves message 1 out of the prompt (role 'tool')" in told["message"] and told["param"] == "messages"


def test_every_turn_finds_the_turn_before(server):
    """The template ends a conversation with an end token that no turn within it has."""
    talk, before = [{"role": "system", "content": "The harbour was dug by the guild. " * 6}, USER], 0
    for i in range(3):
        usage = chat(server, messages=talk)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == before
        before = usage["prompt_tokens"] - len("<|assistant|>\n")
        talk = [*talk, ANSWER, {"role": "user", "content": f"more {i}"}]


# -- fields -----------------------------------------------------------------------------------------------------------

ASKS_FOR_NOTHING: list[dict[str, Any]] = [
    {"best_of": 1},
    {"chat_template_kwargs": {}},
    {"echo": False, "add_special_tokens": False},
    {"frequency_penalty": 0.0, "presence_penalty": 0},
    {"guided_json": None, "structured_outputs": None},
    {"kvgraph": {"method": None, "rounds": None}},
    {"length_penalty": 1.0},
    {"logit_bias": {}},
    {"logit_bias": []},
    {"logprobs": False, "top_logprobs": 0},
    {"metadata": {"a": "b"}, "user": "u", "store": False, "service_tier": "auto", "prompt_cache_key": "k"},
    {"min_tokens": 0},
    {"n": None, "stop": None, "stream": None, "seed": None, "top_k": None, "documents": None},
    {"priority": 0, "request_id": "r"},
    {"prompt_cache_retention": "24h", "safety_identifier": "x"},
    {"reasoning_effort": "none"},
    {"reasoning_effort": None, "verbosity": "medium"},
    {"response_format": {"type": "text"}},
    {"skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False},
    {"stream_options": {"include_usage": None}},
    {"tools": [], "functions": []},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"use_beam_search": False, "early_stopping": False},
]


@pytest.mark.parametrize("fields", ASKS_FOR_NOTHING, ids=lambda fields: json.dumps(fields)[:50])
def test_what_asks_for_nothing_is_taken(server, fields):
    answer = chat(server, **fields)
    assert text(answer) == text(chat(server)) and "ignored" not in answer["usage"]["kvgraph"]


@pytest.mark.parametrize(
    "fields",
    [
        {"length_penalty": 2.0},
        {"skip_special_tokens": False},
        {"skip_special_tokens": 1},  # which equals True in Python
        {"suffix": "end"},
        {"echo": True},
        {"add_special_tokens": True},
        {"use_beam_search": True},
        {"best_of": 3},
    ],
    ids=lambda fields: json.dumps(fields)[:50],
)
def test_what_would_change_the_answer_is_refused(server, fields):
    told = chat(server, 400, **fields)
    assert (told["param"], told["code"]) == (*fields, "unsupported_parameter") and "isn't supported" in told["message"]


def test_unknown_fields_are_reported(server, caplog):
    caplog.set_level("INFO", "kvgraph")
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "citations": {"enabled": True}}
    document = {"text": "x", "url": "http://e"}
    sent = {"messages": [{"role": "user", "content": [part], "images": ["x"]}], "documents": [document], "foo": 1}
    names = ["foo", "documents.0.url", "messages.0.images", "messages.0.content.0.citations"]
    assert sorted(chat(server, **sent, bar=None, baz=[])["usage"]["kvgraph"]["ignored"]) == sorted(names)
    (record,) = [r for r in caplog.records if "ignored" in r.getMessage()]
    assert sorted(record.fields["ignored"]) == sorted(names)
    body = {"model": server.name, **sent, "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}}
    *_, last, done = events(httpx.post(f"{server.url}/v1/chat/completions", json=body).text)
    assert done == "[DONE]" and sorted(last["usage"]["kvgraph"]["ignored"]) == sorted(names)


EFFORTS = ("minimal", "low", "medium", "high")


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_that_the_template_does_not_take_is_reported(server, effort):
    answer = chat(server, reasoning_effort=effort)
    assert answer["usage"]["kvgraph"]["ignored"] == ["reasoning_effort"] and text(answer) == text(chat(server))
    body = {"model": server.name, "max_tokens": 2}
    for path, more, name in (
        ("completions", {"prompt": "Hi", "reasoning_effort": effort}, "reasoning_effort"),
        (
            "responses",
            {"input": "Hi", "max_output_tokens": 2, "max_tokens": None, "reasoning": {"effort": effort}},
            "reasoning.effort",
        ),
    ):
        told = httpx.post(f"{server.url}/v1/{path}", json=body | more, timeout=60).json()
        assert told["usage"]["kvgraph"]["ignored"] == [name], told


def test_an_effort_goes_to_a_template_that_takes_it(model):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ reasoning_effort or '-' }}"
    app = application(Engine(model, kv_budget=1 << 28), chat_template_kwargs={"reasoning_effort": "server's"})
    with serving(app) as url:
        server = Live(app, url)
        server.server.tokenizer.chat_template, before = template, server.server.tokenizer.chat_template
        try:
            for more, effort in (
                *[({"reasoning_effort": effort}, effort) for effort in ("none", *EFFORTS)],
                ({}, "server's"),
                ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "mine"}}, "mine"),
            ):
                usage = chat(server, **more)["usage"]
                assert usage["prompt_tokens"] == len(server.server.engine.tokenize("Hi" + effort))
                assert "ignored" not in usage["kvgraph"]
                body = {"model": server.name, "messages": [USER], **more}
                told = httpx.post(f"{url}/tokenize", json=body).json()
                assert server.server.tokenizer.decode(told["tokens"]) == "Hi" + effort
            body = {"model": server.name, "input": "Hi", "reasoning": {"effort": "low"}, "max_output_tokens": 2}
            made = httpx.post(f"{url}/v1/responses", json=body, timeout=60).json()
            assert made["reasoning"]["effort"] == "low" and "ignored" not in made["usage"]["kvgraph"]
            assert made["usage"]["input_tokens"] == len(server.server.engine.tokenize("Hilow"))
            told = chat(server, 400, reasoning_effort="extreme")
            assert (told["param"], told["code"]) == ("reasoning_effort", "invalid_value")
        finally:
            server.server.tokenizer.chat_template = before


def test_top_p_of_nothing_is_the_likeliest_token(server):
    best = text(chat(server, max_tokens=8, temperature=0))
    for seed in range(3):
        assert text(chat(server, max_tokens=8, temperature=1.5, top_p=0, seed=seed)) == best
    greedy = server.ask(prompt="Hi", max_tokens=8, temperature=0).json()["choices"][0]["text"]
    assert server.ask(prompt="Hi", max_tokens=8, temperature=2, top_p=0.0).json()["choices"][0]["text"] == greedy


def test_unknown_fields_may_be_refused(model):
    app = application(Engine(model, kv_budget=1 << 28), unknown_fields="refuse")
    with serving(app) as url:
        server = Live(app, url)
        told = chat(server, 400, messages=[USER | {"images": ["x"]}])
        assert (told["param"], told["code"]) == ("messages.0.images", "unknown_parameter")
        told = chat(server, 400, reasoning_effort="low")
        assert (told["param"], told["code"]) == ("reasoning_effort", "unknown_parameter")
        chat(server, reasoning_effort="none")
        chat(server, foo=None, messages=[ANSWER | {"tool_calls": None}, USER], user="u")


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
         "messages.0.content.1.type", "invalid_value", "must be 'text'"),
        ({"messages": [{"role": "user", "content": 5}]},
         "messages.0.content", "invalid_type", "must be a valid string or a list"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "missing_required_parameter", "messages.0.role is missing"),
        ({"messages": []}, "messages", "array_below_min_length", "must have at least 1 item"),
        ({"messages": None}, "messages", "missing_required_parameter", "messages is missing"),
        ({"stop": ["a", ""]}, "stop.1", "string_below_min_length", "at least 1 character"),
        ({"stop": ""}, "stop", "string_below_min_length", "at least 1 character"),
        ({"stop": {}}, "stop", "invalid_type", "must be a valid string or a list"),
        ({"temperature": "0"}, "temperature", "invalid_type", "must be a valid number"),
        ({"temperature": -1}, "temperature", "number_below_min_value", "greater than or equal to 0"),
        ({"n": 0}, "n", "number_below_min_value", "greater than or equal to 1"),
        ({"documents": ["a text"]}, "documents.0", "invalid_type", "must be an object"),
        ({"documents": [{"data": {"text": "x"}}]}, "documents.0.text", "missing_required_parameter", "is missing"),
        ({"documents": [{"segment": "s", "text": "x"}]}, "documents.0.text", "unknown_parameter", "is not a known field"),
        ({"kvgraph": {"edges": [[0]]}}, "kvgraph.edges.0.1", "missing_required_parameter", "is missing"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_required_parameter", "is missing"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_error_names_the_field(server, fields, param, code, message):
    told = chat(server, 400, **fields)
    assert (told["param"], told["code"]) == (param, code) and message in told["message"]
    assert told["type"] == "invalid_request_error" and "\n" not in told["message"]


def test_a_route_that_is_not_there_names_those_that_are(server):
    told = error(httpx.post(f"{server.url}/v1/chat", json={}, timeout=60), 404)
    assert told["code"] == "unknown_url" and "/v1/chat/completions" in told["message"] and "/health" in told["message"]


# -- HTTP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/tiny", "/metrics", "/"])
def test_head_is_get_without_the_body(server, path):
    head, get = (httpx.request(method, server.url + path) for method in ("HEAD", "GET"))
    assert head.status_code == get.status_code == 200 and head.content == b"" != get.content
    assert head.headers["content-type"] == get.headers["content-type"]
    assert httpx.head(f"{server.url}/v1/completions").status_code == 405


def test_a_last_slash_is_nothing(server):
    assert httpx.get(f"{server.url}/v1/models/").json() == httpx.get(f"{server.url}/v1/models").json()
    body = {"model": server.name, "messages": [USER], "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/chat/completions/", json=body).status_code == 200


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({}, "there is no Content-Type"),
        ({"Content-Type": "text/plain"}, "Content-Type is 'text/plain'"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "send application/json"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "Content-Encoding is 'gzip'"),
    ],
)
def test_a_body_that_is_not_plain_json_is_named(server, headers, says):
    body = json.dumps(server.body()).encode()
    assert says in error(httpx.post(f"{server.url}/v1/completions", content=body, headers=headers), 415)["message"]
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"):
        assert httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": kind}).is_success


def test_a_body_that_is_not_text_is_named(server):
    for body in (gzip.compress(json.dumps(server.body()).encode()), '{"prompt": "é"}'.encode("latin-1")):
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert "isn't UTF-8 text" in error(answer, 400)["message"]


def test_web_pages_are_let_in_by_setting(server, model):
    ask = {
        "Origin": "http://x",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    assert httpx.options(f"{server.url}/v1/completions", headers=ask).status_code == 405
    app = application(Engine(model, kv_budget=1 << 28), cors_origins=["http://x"])
    with serving(app) as url:
        allowed = httpx.options(f"{url}/v1/chat/completions", headers=ask)
        assert allowed.status_code == 200 and "authorization" in allowed.headers["access-control-allow-headers"]
        assert allowed.headers["access-control-allow-origin"] == "http://x"
        refused = httpx.post(f"{url}/v1/completions", headers={"Origin": "http://x"}, json={})
        assert refused.status_code == 400 and refused.headers["access-control-allow-origin"] == "http://x"
        other = httpx.get(f"{url}/v1/models", headers={"Origin": "http://y"})
        assert "access-control-allow-origin" not in other.headers


ROUTES = {
    "POST": ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize", "/v1/graphs"],
    "GET": ["/v1/models", "/v1/models/tiny", "/tokenizer_info", "/health", "/ready", "/metrics", "/"],
    "PUT": ["/v1/segments"],
    "DELETE": ["/v1/segments/a", "/v1/responses/a"],
}


def test_every_route_answers_a_preflight(model):
    app = application(
        Engine(model, kv_budget=1 << 28),
        cors_origins=["http://x"],
        api_keys=[{"key": "a-long-enough-key", "tenant": "ann"}],
    )
    with serving(app) as url:
        for method, paths in ROUTES.items():
            ask = {
                "Origin": "http://x",
                "Access-Control-Request-Method": method,
                "Access-Control-Request-Headers": "authorization,content-type",
            }
            for path in paths:
                allowed = httpx.options(url + path, headers=ask)  # browsers send no key with it
                assert allowed.status_code == 200, (method, path)
                assert allowed.headers["access-control-allow-origin"] == "http://x"
                assert method in allowed.headers["access-control-allow-methods"]
                named = allowed.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
                assert {"authorization", "content-type"} <= set(named)
                assert httpx.options(url + path, headers=ask | {"Origin": "http://y"}).status_code == 400
        told = httpx.post(f"{url}/v1/completions", headers={"Origin": "http://x"}, json={"model": "m", "prompt": "a"})
        assert told.status_code == 401 and told.headers["access-control-allow-origin"] == "http://x"


@pytest.mark.parametrize("cors", [[], ["http://x"]])
def test_options_name_the_methods_of_a_route(model, cors):
    """Plain OPTIONS, with or without pages of other sites: what there is, and no page is let in."""
    with serving(application(Engine(model, kv_budget=1 << 28), cors_origins=cors)) as url:
        for method, paths in ROUTES.items():
            for path in paths:
                answer = httpx.options(url + path)
                assert answer.status_code == 405 and method in answer.headers["allow"].split(", "), (method, path)
                assert "access-control-allow-origin" not in answer.headers
        assert httpx.options(f"{url}/nowhere").status_code == 404


def test_a_stream_shows_signs_of_life_until_it_begins(server, monkeypatch):
    monkeypatch.setattr("kvgraph.server.lifecycle.ALIVE_EVERY", 0.1)
    server.server.runner.call(lambda: time.sleep(0.6))
    said = httpx.post(f"{server.url}/v1/completions", json=server.body(stream=True), timeout=60).text
    comments, rest = said.split("data: ", 1)
    assert comments.count(": ") >= 2 and set(comments.split("\n\n")) == {": the answer hasn't begun", ""}
    assert ": the answer" not in rest and rest.endswith("[DONE]\n\n")


def test_chunks_hold_no_nulls_that_openais_lack(server):
    body = {"model": server.name, "messages": [USER], "max_tokens": 3, "stream": True}
    *chunks, _ = events(httpx.post(f"{server.url}/v1/chat/completions", json=body).text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert all(None not in chunk["choices"][0]["delta"].values() and "usage" not in chunk for chunk in chunks)
    assert all("finish_reason" in chunk["choices"][0] for chunk in chunks)


def test_a_chat_without_documents_computes_no_document(server):
    usage = chat(server, messages=[{"role": "system", "content": f"Be {time.time()}"}, USER])["usage"]["kvgraph"]
    assert usage["computed_tokens"] > 0 == usage["document_tokens_computed"]


# -- sampling, templates and usage ------------------------------------------------------------------------------------


def test_penalties_biases_and_lengths_are_the_engines(server, model):
    from kvgraph.graph import ContextGraph

    engine = Engine(model, kv_budget=1 << 28)
    greedy = server.ask(prompt="Hi", max_tokens=8, temperature=0, ignore_eos=False)
    text = greedy.json()["choices"][0]["text"]
    ids = engine.generate(ContextGraph([], "Hi"), max_tokens=8).token_ids
    for fields in (
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"logit_bias": {str(ids[0]): -100}},
        {"stop": text[:1], "min_tokens": 4},
        {"stop_token_ids": ids[:1], "min_tokens": 4},
    ):
        answer = server.ask(prompt="Hi", max_tokens=8, temperature=0, ignore_eos=False, **fields).json()
        params = {k: {int(t): b for t, b in v.items()} if k == "logit_bias" else v for k, v in fields.items()}
        want = engine.generate(ContextGraph([], "Hi"), max_tokens=8, **params)
        assert answer["choices"][0]["text"] == want.text
        assert answer["usage"]["completion_tokens"] == want.usage.completion_tokens >= 4
    assert chat(server, 400, frequency_penalty=3)["code"] == "number_above_max_value"
    assert chat(server, 400, logit_bias={"x": 1})["param"] == "logit_bias.x"


def test_an_answer_that_has_begun_is_continued(server):
    begun = [USER, {"role": "assistant", "content": "The"}]
    closed = chat(server, messages=begun)["usage"]["prompt_tokens"]
    continued = chat(server, messages=begun, continue_final_message=True, add_generation_prompt=False)
    assert continued["usage"]["prompt_tokens"] == closed - len(
        server.server.engine.tokenize("<|end|>\n<|assistant|>\n")
    )
    told = chat(server, 400, messages=[USER], continue_final_message=True, add_generation_prompt=False)
    assert told["param"] == "continue_final_message"
    assert chat(server, 400, messages=begun, continue_final_message=True, add_generation_prompt=True)["param"] == (
        "continue_final_message"
    )


def test_variables_go_to_the_template(model):
    template = "{% if shout %}LOUD{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    app = application(Engine(model, kv_budget=1 << 28), chat_template_kwargs={"shout": True})
    with serving(app) as url:
        server = Live(app, url)
        server.server.tokenizer.chat_template, before = template, server.server.tokenizer.chat_template
        try:
            assert chat(server)["usage"]["prompt_tokens"] == len("LOUDHi")
            assert chat(server, chat_template_kwargs={"shout": False})["usage"]["prompt_tokens"] == len("Hi")
            for name in ("chat_template", "messages", "tokenize", "documents", "add_generation_prompt"):
                told = chat(server, 400, chat_template_kwargs={name: "{{ 1 }}"})
                assert told["param"] == f"chat_template_kwargs.{name}"
        finally:
            server.server.tokenizer.chat_template = before


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_usage_may_come_with_every_chunk(server, path):
    body = server.body(stream=True, n=2, max_tokens=4, messages=[USER])
    body.pop("messages" if path == "completions" else "prompt")
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = httpx.post(f"{server.url}/v1/{path}", json=body | {"stream_options": options})
    *chunks, last, _ = events(answer.text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] == 8
    for chunk in chunks:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    without = httpx.post(f"{server.url}/v1/{path}", json=body | {"stream_options": {"continuous_usage_stats": True}})
    assert not any("usage" in chunk for chunk in events(without.text)[:-1])
