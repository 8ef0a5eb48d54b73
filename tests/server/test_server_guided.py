"""Structured output as clients ask for it: `response_format`, and the fields of vLLM's server."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema_rs
import openai
import pydantic
import pytest

from kvgraph import Engine, demo
from serving import Live, application, serving

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(pydantic.BaseModel):
    """As `SCHEMA` has it."""

    name: str = pydantic.Field(max_length=8)
    age: int = pydantic.Field(ge=0, le=99)


@pytest.fixture(scope="module")
def server(model):
    app = application(Engine(model, kv_budget=1 << 28))
    with serving(app) as url:
        yield Live(app, url)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def chat(server: Live, status: int = 200, **more: Any) -> Any:
    """The text of an answer; of an error, what it says."""
    messages = [{"role": "user", "content": "Who?"}]
    body = {"model": server.name, "messages": messages, "max_tokens": 400, **more}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()["choices"][0]["message"]["content"] if status == 200 else answer.json()["error"]


def test_the_client_parses_a_model(server, client):
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=server.name, messages=[{"role": "user", "content": "Who?"}], response_format=Person, seed=seed
        )
        assert isinstance(answer.choices[0].message.parsed, Person) and answer.choices[0].finish_reason == "stop"


def test_a_stream_is_the_same_text(server, client):
    asked = {
        "model": server.name,
        "messages": [{"role": "user", "content": "Who?"}],
        "seed": 1,
        "response_format": schema_format(SCHEMA),
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = client.chat.completions.create(stream=True, **asked)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    jsonschema_rs.validate(SCHEMA, json.loads(whole))


def test_every_choice_is_valid(server, client):
    answer = client.chat.completions.create(
        model=server.name,
        messages=[{"role": "user", "content": "Who?"}],
        n=4,
        seed=0,
        response_format=schema_format(SCHEMA),
    )
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 4 and all(jsonschema_rs.is_valid(SCHEMA, json.loads(text)) for text in texts)


def test_a_json_object(server):
    close = {str(Engine.tokenize(server.server.engine, text)[0]): 20 for text in '"}'}
    text = chat(server, response_format={"type": "json_object"}, logit_bias=close, seed=0)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"response_format": {"type": "text"}, "guided_json": SCHEMA},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
def test_a_schema_has_several_names(server, fields):
    assert chat(server, seed=3, **fields) == chat(server, seed=3, response_format=schema_format(SCHEMA))


@pytest.mark.parametrize("form", ["guided_{}", "structured_outputs"])
def test_expressions_choices_and_grammars(server, form):
    def asked(kind: str, value: Any) -> str:
        wrapped = {kind: value} if form == "structured_outputs" else value
        return chat(server, seed=0, **{form.format(kind): wrapped})

    assert re.fullmatch("[ab]{5}/", asked("regex", "[ab]{5}/"))
    assert asked("choice", ["north cape", "south cape"]) in ("north cape", "south cape")
    assert re.fullmatch("x[0-9]{3}", asked("grammar", 'start: "x" /[0-9]{3}/'))


def test_completions_take_it_too(server):
    body = {"model": server.name, "prompt": ["a", "b"], "guided_regex": "[0-9]{3}", "max_tokens": 10}
    choices = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert len(choices) == 2 and all(re.fullmatch("[0-9]{3}", choice["text"]) for choice in choices)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        (
            {"response_format": schema_format({"type": "object", "properties": {"a": {"type": "strin"}}})},
            "response_format",
            "response_format can't be used: at 'properties/a' of its schema: Invalid type: strin",
        ),
        ({"response_format": schema_format({"not": {}})}, "response_format", 'Unimplemented keys: ["not"]'),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "must be 'text', 'json_object' or"),
        ({"guided_regex": "a(b"}, "guided_regex", "unclosed group"),
        ({"guided_json": "{"}, "guided_json", "EOF"),
        ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar", 'unknown name: "foo"'),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "both say what the answer must be"),
        ({"guided_choice": []}, "guided_choice", "at least 1 item"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cant_be_used_says_where(server, fields, param, says):
    told = chat(server, 400, **fields)
    assert told["param"] == param and says in told["message"], told
    assert told["code"] and "\n" not in told["message"]


def test_a_model_that_cant_be_guided_says_so():
    with serving(application(Engine.load(demo.model(), check=False))) as url:
        body = {"model": "model", "prompt": "a", "guided_regex": "a"}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400 and "answers of this model can't be guided" in answer.json()["error"]["message"]
