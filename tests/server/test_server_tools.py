"""Function tools over HTTP. A model with random weights chooses nothing sensible, but what it is forced to call is valid."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest

import families
from kvgraph import Engine, models
from kvgraph.engine.guide import LONGEST, SEARCHED
from kvgraph.engine.request import Request
from kvgraph.server.prompts import lay_out
from kvgraph.server.schema import ChatRequest
from kvgraph.server.tools.dialect import dialect_of
from serving import Live, application, error, events, serving
from soak import SOAK, draws
from template_tokenizer import tokenizer
from tool_templates import ELEMENTS, HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, PLAIN, THINKING, THINKS

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
SCHEMAS = {"get_weather": CITY, "get_time": {"type": "object", "maxProperties": 0}}
USER = {"role": "user", "content": "Weather?"}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
TEMPLATES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral-args": MISTRAL_ARGS,
    "elements": ELEMENTS,
    "plain": PLAIN,
}


def small(marks: Sequence[str] = ()) -> models.Model:
    """A model that is smaller than that of other modules, with a token a byte. marks: further special tokens."""
    made = tokenizer(None)
    made.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": list(marks)})
    return models.wrap(
        families.build("Llama", num_hidden_layers=1, vocab_size=len(made), eos_token_id=made.eos_token_id), made
    )


@pytest.fixture(scope="module")
def model() -> models.Model:
    return small()


@pytest.fixture(scope="module")
def served(server) -> Callable[[str], Live]:
    """The module's server, with a chat template."""

    def with_template(template: str) -> Live:
        server.server.engine.model.tokenizer.chat_template = template
        return server

    return with_template


def body_of(server: Live, **more: Any) -> dict[str, Any]:
    """A request; its bias has strings, numbers and lists of calls of a random model end soon."""
    engine = server.server.engine
    ends = {str(engine.tokenize(text)[0]): 8 for text in '"}]'} | {str(engine.model.tokenizer.eos_token_id): 16}
    body = {"model": server.name, "messages": [USER], "tools": TOOLS, "max_tokens": 400, "seed": 0}
    return body | ({"logit_bias": ends} if "tool_choice" in more or "response_format" in more else {}) | more


def ask(server: Live, status: int = 200, **more: Any) -> Any:
    body = body_of(server, **more)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()["choices"][0] if status == 200 else error(answer, status)


def calls(choice: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments of a choice's calls, which are valid."""
    found = [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"]["tool_calls"]]
    for call in choice["message"]["tool_calls"]:
        assert call["type"] == "function" and call["id"]
    for name, arguments in found:
        jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))
    return found


CHOICES = {"required": "required", "named": NAMED}
FORCED = [(template, choice) for choice in CHOICES for template in TEMPLATES]


@pytest.mark.parametrize(("template", "choice"), FORCED if SOAK else [*FORCED[:6:2], *FORCED[7::2]])
def test_forced_calls_parse_and_validate(served, template, choice):
    server, choice = served(TEMPLATES[template]), CHOICES[choice]
    for seed in range(draws(1)):
        made = ask(server, tool_choice=choice, seed=seed)
        found = calls(made)
        assert made["finish_reason"] == "tool_calls" and made["message"]["content"] is None
        assert choice == "required" or [name for name, _ in found] == ["get_weather"]
        assert all(made["message"]["tool_calls"][0]["id"] != call["id"] for call in made["message"]["tool_calls"][1:])
        one = ask(server, tool_choice=choice, seed=seed, parallel_tool_calls=False)
        assert len(calls(one)) == 1


def streamed(server: Live, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chunks' choices, and the message that they add up to."""
    body = body_of(server, stream=True, **more)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    chunks = [event["choices"][0] for event in events(answer.text) if event != "[DONE]" and event["choices"]]
    whole: dict[str, Any] = {"content": "", "tool_calls": []}
    for chunk in chunks:
        whole["content"] += chunk["delta"].get("content") or ""
        for part in chunk["delta"].get("tool_calls", []):
            if "id" in part:
                assert part["index"] == len(whole["tool_calls"]) and part["type"] == "function"
                assert part["function"] == {"name": part["function"]["name"], "arguments": ""}
                whole["tool_calls"].append({"name": part["function"]["name"], "arguments": ""})
            else:
                assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
                whole["tool_calls"][part["index"]]["arguments"] += part["function"]["arguments"]
    return chunks, whole


@pytest.mark.parametrize("template", ["hermes", "llama", "mistral", "mistral-args"])
def test_a_stream_is_the_same_calls(served, template):
    server = served(TEMPLATES[template])
    whole = ask(server, tool_choice="required")
    chunks, joined = streamed(server, tool_choice="required")
    assert joined["content"] == ""
    assert [(c["name"], c["arguments"]) for c in joined["tool_calls"]] == calls(whole)
    assert [c["finish_reason"] for c in chunks if c["finish_reason"]] == ["tool_calls"]
    assert chunks[-1]["delta"] == {} and chunks[0]["delta"]["role"] == "assistant"
    fragments = [part for c in chunks for part in c["delta"].get("tool_calls", ()) if "id" not in part]
    assert len(fragments) > len(joined["tool_calls"])  # arguments come piece by piece


def test_the_client_adds_a_stream_up(served):
    server = served(HERMES)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with client.chat.completions.stream(**body_of(server, tool_choice="required")) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    found = [(c.function.name, c.function.arguments) for c in final.message.tool_calls]
    assert found == calls(ask(server, tool_choice="required"))


def test_a_call_that_is_cut_short_says_so(served):
    made = ask(served(HERMES), tool_choice=NAMED, max_tokens=60)
    assert made["finish_reason"] == "length"
    (call,) = made["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather" and '{"city"' in '{"city"' + call["function"]["arguments"]
    short = ask(served(HERMES), tool_choice=NAMED, max_tokens=5)
    assert short["finish_reason"] == "length" and short["message"].get("tool_calls") is None


def test_several_answers_each_have_calls(served):
    body = {
        "model": "x",
        "messages": [USER],
        "tools": TOOLS,
        "n": 3,
        "tool_choice": NAMED,
        "seed": 0,
        "max_tokens": 300,
    }
    server = served(HERMES)
    choices = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"model": server.name}, timeout=60).json()[
        "choices"
    ]
    assert len({calls(choice)[0] for choice in choices}) == 3


def test_some_of_the_tools_may_be_allowed(served):
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}}  # fmt: skip
    for seed in range(3):
        assert {name for name, _ in calls(ask(served(HERMES), tool_choice=allowed, seed=seed))} == {"get_time"}


def test_marks_that_are_special_tokens_are_written_and_seen():
    """They are left out of ordinary texts, and no grammar of texts has them."""
    app = application(Engine(small(MARKS), kv_budget=1 << 26))
    with serving(app) as url:
        server = Live(app, url)
        for template in ("hermes", "llama", "mistral", "mistral-args"):
            server.server.engine.model.tokenizer.chat_template = TEMPLATES[template]
            made = ask(server, tool_choice="required", logprobs=True)
            calls(made)
            written = [entry["token"] for entry in made["logprobs"]["content"]]
            assert template == "llama" or {"hermes": "<tool_call>"}.get(template, "[TOOL_CALLS]") in written


# -- a scripted model ---------------------------------------------------------------------------------------------------


class Script:
    """Has the engine answer a text, whatever the weights say: each token is the only one that may come next."""

    def __init__(self, monkeypatch, server: Live):
        self.text, engine = "", server.server.engine
        prepare = engine.prepare

        def scripted(*arguments: Any, **options: Any) -> Request:
            request = prepare(*arguments, **options)
            ids = [*engine.tokenize(self.text), next(iter(engine.model.eos_ids))]
            sampler, left = request.sampler, iter(ids)
            request.sampler = lambda *given: sampler(*given)._replace(token=next(left))
            self.guided = request.guide is not None
            self.prompt = engine.model.tokenizer.decode(request.plan.prompt.tokens)
            return request

        monkeypatch.setattr(engine, "prepare", scripted)


@pytest.fixture
def script(monkeypatch, served) -> Callable[[str], tuple[Live, Script]]:
    def start(template: str) -> tuple[Live, Script]:
        server = served(template)
        return server, Script(monkeypatch, server)

    return start


CHOSEN = {
    "hermes": 'Let me look.\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
    "llama": '{"name": "get_time", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "get_time", "arguments": {}}]',
    "mistral-args": "[TOOL_CALLS]get_time[ARGS]{}",
}


@pytest.mark.parametrize("template", CHOSEN)
def test_a_model_may_choose_to_call(script, template):
    server, scripted = script(TEMPLATES[template])
    scripted.text = CHOSEN[template]
    made = ask(server)
    assert calls(made) == [("get_time", "{}")] and made["finish_reason"] == "tool_calls" and not scripted.guided
    assert made["message"]["content"] == ("Let me look." if template == "hermes" else None)
    chunks, joined = streamed(server)
    assert joined["tool_calls"] == [{"name": "get_time", "arguments": "{}"}]
    assert joined["content"] == (made["message"]["content"] or "")


def test_a_model_may_choose_not_to_call(script):
    server, scripted = script(HERMES)
    scripted.text = "It is sunny. "
    made = ask(server)
    assert made["message"] == {"role": "assistant", "content": "It is sunny. "} and made["finish_reason"] == "stop"
    assert streamed(server)[1]["content"] == "It is sunny. "


def test_a_malformed_call_is_text(script):
    server, scripted = script(HERMES)
    for text in ('<tool_call>{"name": "get_time", "arguments": {</tool_call>', '<tool_call>{"name": "rm"}</tool_call>'):
        scripted.text = text
        made = ask(server)
        assert made["message"] == {"role": "assistant", "content": text} and made["finish_reason"] == "stop"
        assert streamed(server)[1] == {"content": text, "tool_calls": []}


def test_only_one_call_unless_they_may_be_parallel(script):
    server, scripted = script(HERMES)
    scripted.text = '<tool_call>{"name": "get_time"}</tool_call>\n' * 2
    assert len(calls(ask(server))) == 2 and len(calls(ask(server, parallel_tool_calls=False))) == 1


def test_thoughts_come_apart(script):
    server, scripted = script(THINKS)
    scripted.text = '<think>\nThe clock.\n</think>\n\n<tool_call>{"name": "get_time"}</tool_call>'
    message = ask(server)["message"]
    assert message["reasoning_content"] == "The clock." and message["content"] is None and message["tool_calls"]
    scripted.text = "<think>\nHm.\n</think>\n\nSunny."
    message = ask(server, tools=[])["message"]
    assert message == {"role": "assistant", "content": "Sunny.", "reasoning_content": "Hm."}
    body = {"model": server.name, "messages": [USER], "stream": True}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    deltas = [event["choices"][0]["delta"] for event in events(answer.text)[:-1]]
    assert "".join(d.get("reasoning_content") or "" for d in deltas) == "Hm."
    assert "".join(d.get("content") or "" for d in deltas) == "Sunny."
    scripted.text = "Hm.</think>Sunny."  # of a template that opens them itself
    server.server.engine.model.tokenizer.chat_template = THINKING
    assert ask(server, tools=[])["message"]["reasoning_content"] == "Hm."


# -- strict functions, and answers with a form of their own -----------------------------------------------------------------


@pytest.mark.parametrize("template", ["hermes", "llama", "mistral", "mistral-args"])
def test_a_strict_function_is_kept_to_its_schema_where_the_model_chooses(served, template):
    server = served(TEMPLATES[template])
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    body = ChatRequest(model=server.name, messages=[USER], tools=[strict])
    (laid,) = lay_out(server.server, server.server.tenants.caller(None), body)
    engine, guide = server.server.engine, laid.requests[0].guide
    assert guide is not None

    def fits(text: str) -> bool:
        matcher = guide.matcher.deep_copy()
        ids = engine.tokenize(text)
        return matcher.try_consume_tokens(ids) == len(ids)

    good = json.dumps({"city": "Oslo", "days": 2})
    form = dialect_of(engine.model.tokenizer).format
    call = form.opening + form.head("get_weather") + good + form.tail + form.closing
    assert fits(call) and fits("Some text.") and not fits(call.replace("2", "7")) and not fits(form.opens[-1] + "}")
    assert fits("Some text. " + call) or form.first


def test_an_answer_is_of_its_form_or_a_call(served):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}}}  # fmt: skip
    server = served(HERMES)
    for first, reason in (("{", "stop"), ("<", "tool_calls")):
        bias = body_of(server, response_format=form)["logit_bias"] | {str(server.server.engine.tokenize(first)[0]): 100}
        made = ask(server, response_format=form, logit_bias=bias)
        assert made["finish_reason"] == reason
        if reason == "stop":
            assert isinstance(json.loads(made["message"]["content"])["ok"], bool)
        else:
            calls(made)
    assert calls(ask(server, response_format=form, tool_choice="required"))


# -- what can't be ------------------------------------------------------------------------------------------------------


def test_a_template_without_tools_leaves_no_choice(served):
    for template, why in ((PLAIN, "has no place for tools"), (ELEMENTS, "writes calls in a form that can't be read")):
        told = ask(served(template), 400)
        assert why in told["message"] and told["param"] == "tools" and "tool_choice" in told["message"]
    assert ask(served(PLAIN), tool_choice="none", max_tokens=2)["message"]["content"] is not None


def f(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **more}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [f(), f()]}, "tools.1.function.name", "two functions 'f'"),
        ({"tools": [f()], "tool_choice": NAMED}, "tool_choice.function.name", "'get_weather' isn't one of the tools"),
        ({"tools": [f()], "tool_choice": "any"}, "tool_choice", "must be 'none', 'auto' or 'required'"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type", "must be 'function'"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "must match"),
        (
            {"tools": [TIME, f(parameters={"properties": {"a": {"type": "strin"}}})], "tool_choice": "required"},
            "tools.1.function.parameters",
            "at 'properties/a' of its schema: Invalid type: strin",
        ),
        ({"tools": [f(parameters={"not": {}}, strict=True)]}, "tools.0.function.parameters", 'Unimplemented keys: ["not"]'),
        ({"guided_regex": "a"}, "tools", "both say what the answer must be"),
        ({"tools": [], "functions": [{"name": "f"}]}, "functions", "send `tools`"),
        ({"tools": [], "function_call": {"name": "f"}}, "function_call", "send `tools`"),
        (
            {"messages": [{**USER, "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f"}}]}]},
            "messages.0.tool_calls",
            "are those of the assistant's messages",
        ),
        (
            {"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]},
            "messages.1.function_call",
            "send `tool_calls`",
        ),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_cant_be_says_where(served, fields, param, says):
    told = ask(served(HERMES), 400, **fields)
    assert told["param"] == param and says in told["message"], told


def test_naming_a_function_that_cant_be_kept_to_ends_after_some(served, monkeypatch):
    guides, made = served(HERMES).server.engine.scheduler.guides, []
    compiled = guides._matcher
    monkeypatch.setattr(guides, "_matcher", lambda grammar: made.append(len(grammar.text)) or compiled(grammar))
    parameters = {"properties": {"a": {"const": "x" * 60_000}}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(12)]
    told = ask(served(HERMES), 400, tools=tools, tool_choice="required")
    assert told["param"] == "tools" and "a grammar may have 131072 characters" in told["message"]
    assert 0 < sum(made) < SEARCHED + LONGEST


# -- messages back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [*TEMPLATES])
def test_calls_and_results_go_back(served, template):
    server = served(TEMPLATES[template])
    made = ask(server, tool_choice=NAMED)["message"]
    talk = [USER, made, {"role": "tool", "tool_call_id": made["tool_calls"][0]["id"], "content": "Sunny, 25 degrees."}]
    asked = {"tools": TOOLS} if template not in ("plain", "elements") else {"tools": []}
    body = {"model": server.name, "messages": talk, "max_tokens": 4, **asked}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    prompt = httpx.post(f"{server.url}/tokenize", json={"messages": talk}, timeout=60).json()["tokens"]
    text = server.server.engine.model.tokenizer.decode(prompt)
    assert "Sunny, 25 degrees." in text and "get_weather" in text


def test_the_next_turn_reuses_the_turn_before(served):
    server = served(HERMES)
    made = ask(server, tool_choice=NAMED)["message"]
    talk = [USER, made, {"role": "tool", "tool_call_id": made["tool_calls"][0]["id"], "content": "Sunny."}]
    body = {"model": server.name, "messages": talk, "max_tokens": 4, "tools": TOOLS}
    usage = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 100


def test_what_a_template_leaves_out_of_calls_is_refused(served):
    forgets = HERMES.replace(
        "{{ call.function.name }}", "{{ 'kvgraph_called' if call.function.name == 'kvgraph_called' }}"
    )
    server = served(forgets)
    answer = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}]}  # fmt: skip
    told = ask(server, 400, messages=[USER, answer, USER])
    assert "leaves message 1 out of the prompt" in told["message"]


def test_arguments_that_are_no_json_go_back_as_they_are(served):
    answer = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": {"name": "get_time", "arguments": "{oops"}}]}  # fmt: skip
    assert ask(
        served(HERMES), messages=[USER, answer, {"role": "tool", "tool_call_id": "a", "content": "no"}], max_tokens=2
    )
