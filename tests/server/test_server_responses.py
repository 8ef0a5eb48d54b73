"""`/v1/responses`, asked by openai-python and by hand: the chat's answers, in events, kept, and gone on from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from kvgraph.engine.result import Usage
from kvgraph.server.responses.answer import ResponseAnswer
from kvgraph.server.responses.kept import Kept, KeptTurn
from kvgraph.server.responses.schema import ResponseEvent, ResponseObject, ResponseRequest
from kvgraph.server.schema import (
    ChatChunkChoice,
    Delta,
    Details,
    FunctionOut,
    PromptDetails,
    ToolCallDelta,
    UsageOut,
)
from serving import ANNA, BEN, DOCUMENTS, KEYS, LONG, Live, error, until

LINES = "The harbour was dug by the guild. " * 6


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture
def ask(server, client):
    """A response to an input, of four tokens and greedy unless told otherwise."""

    def ask(input: Any = "Hi", **more: Any) -> Any:
        fields = {"max_output_tokens": 4, "temperature": 0, **more}
        return client.responses.create(model=server.name, input=input, **fields)

    return ask


def post(server: Live, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    body = {"model": server.name, "input": "Hi", "max_output_tokens": 4, "temperature": 0, **more}
    return httpx.post(f"{server.url}/v1/responses", json=body, headers=headers, timeout=60)


def chat(server: Live, messages: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    body = {"model": server.name, "messages": messages, "max_tokens": 4, "temperature": 0, **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "input",
    [
        "Who?",
        [{"role": "user", "content": "Who?"}],
        [
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "Who?"}],
                "status": "completed",
            }
        ],
        [{"role": "user", "content": [{"type": "input_text", "text": "Wh"}, {"type": "input_text", "text": "o?"}]}],
    ],
    ids=["text", "message", "item", "parts"],
)
def test_a_response_is_the_chats_answer(server, ask, input):
    response = ask(input, instructions="Be brief.")
    told = chat(server, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}])
    assert response.output_text == text(told)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    (item,) = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")
    usage = told["usage"]
    assert (response.usage.input_tokens, response.usage.output_tokens) == (usage["prompt_tokens"], 4)
    assert response.usage.total_tokens == usage["total_tokens"]
    assert response.usage.model_extra["kvgraph"]["method"] == "full"
    assert response.instructions == "Be brief." and response.model == server.name and response.error is None


def test_an_answer_that_ends_by_itself_is_complete(ask):
    response = ask(max_output_tokens=50, extra_body={"stop": [ask().output_text[-1]]})
    assert (response.status, response.incomplete_details, response.output[0].status) == ("completed", None, "completed")
    assert response.completed_at >= response.created_at


def test_documents_methods_and_sampling_are_those_of_a_chat(server, ask):
    extras = {
        "documents": DOCUMENTS,
        "kvgraph": {"method": "graph-kv", "edges": "all", "rounds": 1},
        "top_k": 3,
        "seed": 5,
    }
    response = ask("Why?", temperature=1.5, extra_body=extras)
    told = chat(server, [{"role": "user", "content": "Why?"}], **extras | {"temperature": 1.5})
    assert response.output_text == text(told)
    assert response.usage.model_extra["kvgraph"]["method"] == told["usage"]["kvgraph"]["method"] == "graph-kv"


def test_a_pydantic_model_is_filled(server, client):
    class Ship(BaseModel):
        masts: int
        iron: bool

    for _ in range(2):
        response = client.responses.parse(
            model=server.name, input="A ship", text_format=Ship, max_output_tokens=200, temperature=1.0,
            extra_body={"structured_outputs": None},
        )  # fmt: skip
        if response.status == "completed":  # a number may have as many digits as it likes
            assert isinstance(response.output_parsed, Ship)
            assert response.text.format.type == "json_schema" and response.text.format.name == "Ship"
            break
    else:
        pytest.fail("no answer ended")


def test_json_objects(ask):
    response = ask(text={"format": {"type": "json_object"}}, max_output_tokens=300, extra_body={"logit_bias": {}})
    assert response.output_text.lstrip().startswith("{")


def test_log_probabilities(server, ask):
    response = ask(include=["message.output_text.logprobs"], top_logprobs=2)
    told = chat(server, [{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2)
    found = [entry.model_dump() for entry in response.output[0].content[0].logprobs]
    want = told["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in found] == [entry["token"] for entry in want] and len(found) == 4
    assert all(len(entry["top_logprobs"]) == 2 for entry in found)


# -- events -----------------------------------------------------------------------------------------------------------

ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.incomplete",
]


def test_a_stream_tells_of_every_step(client, server, ask):
    events = list(
        client.responses.create(model=server.name, input="Hi", max_output_tokens=4, temperature=0, stream=True)
    )
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == ORDER
    assert [event.sequence_number for event in events] == list(range(len(events)))
    whole, last = ask(), events[-1].response
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == last.output_text == whole.output_text
    assert {event.item_id for event in deltas} == {last.output[0].id}
    assert events[0].response.status == events[1].response.status == "in_progress" and events[0].response.output == []
    assert {event.response.id for event in (events[0], events[1], events[-1])} == {last.id}
    assert (last.usage.input_tokens, last.usage.output_tokens) == (whole.usage.input_tokens, 4)


def test_the_clients_own_stream_gathers_the_response(client, server):
    stop = chat(server, [{"role": "user", "content": "Hi"}])["choices"][0]["message"]["content"][-1]
    with client.responses.stream(
        model=server.name, input="Hi", max_output_tokens=50, temperature=0, extra_body={"stop": stop}
    ) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.status == "completed" and final.output_text == (snapshots[-1] if snapshots else "")


def test_events_have_their_names_and_no_other_end(server):
    answer = post(server, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in answer.text.split("\n\n") if block]
    assert all(len(block) == 2 and block[0].startswith("event: ") for block in blocks)
    assert [block[0].removeprefix("event: ") for block in blocks] == [
        json.loads(block[1].removeprefix("data: "))["type"] for block in blocks
    ]
    assert "[DONE]" not in answer.text


def test_an_error_in_the_middle_is_the_last_event(live):
    server = live()
    answer = post(server, stream=True, max_output_tokens=LONG, ignore_eos=True, kvgraph={"timeout": 0.3})
    last = json.loads(answer.text.rstrip().rpartition("data: ")[2])
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {
        "code": "timeout",
        "message": "the request took longer than its deadline and was cancelled",
    }
    assert httpx.get(f"{server.url}/v1/responses/{last['response']['id']}").status_code == 404
    until(server.idle)


def test_an_error_before_the_answer_has_its_status(server):
    told = error(post(server, stream=True, max_output_tokens=1 << 20), 400)
    assert told["code"] == "context_length_exceeded"


# -- kept responses ---------------------------------------------------------------------------------------------------


def test_the_next_turn_reuses_the_last(server, ask):
    """KeptTurn N + 1 is the chat of all that was said, and what was computed for turn N is found again."""
    said, name, before = [], None, 0
    for i in range(3):
        new = {"role": "user", "content": f"{i} {LINES}"}
        more = {} if name is None else {"previous_response_id": name}
        response = ask([new], **more)
        said.append(new)
        told = chat(server, said)
        assert response.output_text == text(told) and response.previous_response_id == name
        assert response.usage.input_tokens == told["usage"]["prompt_tokens"]
        assert response.usage.input_tokens_details.cached_tokens >= before * 0.9
        assert response.usage.input_tokens_details.cached_tokens > 0 or not before
        said.append({"role": "assistant", "content": response.output_text})
        name, before = response.id, response.usage.input_tokens


def test_instructions_are_those_of_the_request(server, ask):
    first = ask("One", instructions="Be brief.")
    second = ask("Two", previous_response_id=first.id)
    want = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Two"},
    ]
    assert second.usage.input_tokens == chat(server, want)["usage"]["prompt_tokens"]


def test_output_can_be_sent_back_as_it_came(server, ask):
    first = ask("One", include=["message.output_text.logprobs"])
    sent = [{"role": "user", "content": "One"}, *(item.model_dump() for item in first.output)]
    sent += [{"type": "reasoning", "id": "rs_1", "summary": []}, {"role": "user", "content": "Two"}]
    again = ask(sent)
    assert again.output_text == ask("Two", previous_response_id=first.id).output_text
    assert "ignored" not in again.usage.model_extra["kvgraph"]


def test_a_kept_response_is_given_as_it_was(client, ask):
    response = ask(metadata={"who": "me"})
    assert client.responses.retrieve(response.id).model_dump() == response.model_dump()
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError, match="there is no response") as gone:
        ask(previous_response_id=response.id)
    assert (gone.value.param, gone.value.code) == ("previous_response_id", "previous_response_not_found")
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(response.id)


def test_what_goes_on_from_a_deleted_response_stays(client, ask):
    first = ask("One")
    second = ask("Two", previous_response_id=first.id)
    client.responses.delete(first.id)
    third = ask("Three", previous_response_id=second.id)
    assert third.usage.input_tokens > second.usage.input_tokens


def test_nothing_is_kept_unasked(server, client, ask):
    response = ask(store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    told = error(httpx.get(f"{server.url}/v1/responses/{ask().id}?stream=true"), 400)
    assert told["param"] == "stream"


def test_tenants_see_their_own_responses(live):
    server = live(api_keys=KEYS)
    name = post(server, ANNA).json()["id"]
    assert httpx.get(f"{server.url}/v1/responses/{name}", headers=ANNA).status_code == 200
    assert httpx.get(f"{server.url}/v1/responses/{name}", headers=BEN).status_code == 404
    assert httpx.delete(f"{server.url}/v1/responses/{name}", headers=BEN).status_code == 404
    assert error(post(server, BEN, previous_response_id=name), 404)["param"] == "previous_response_id"
    assert error(httpx.get(f"{server.url}/v1/responses/{name}"), 401)["code"] == "invalid_api_key"


def test_the_oldest_response_goes_first(live):
    server = live(max_kept_bytes=6000)
    names = [post(server).json()["id"] for _ in range(8)]
    found = [httpx.get(f"{server.url}/v1/responses/{name}").status_code for name in names]
    assert found == sorted(found, reverse=True) and {200, 404} == set(found)
    assert 0 < server.server.responses.size("") <= 6000


def turn(size: int, previous: KeptTurn | None = None) -> KeptTurn:
    return KeptTurn(b"r" * size, b"[]", previous)


def test_a_turn_counts_while_something_goes_on_from_it():
    kept = Kept(1000)
    first = turn(98)
    kept.put("t", "a", first)
    second = turn(98, first)
    kept.put("t", "b", second)
    assert kept.size("t") == 200
    assert kept.delete("t", "a") and not kept.delete("t", "a")
    assert kept.size("t") == 200 and kept.get("t", "a") is None
    late = turn(98, first)  # was being answered when its past went
    assert kept.delete("t", "b") and kept.size("t") == 0
    kept.put("t", "c", late)
    assert kept.size("t") == 200
    assert kept.delete("t", "c") and kept.size("t") == 0


def test_the_limit_holds_for_each_tenant():
    kept = Kept(250)
    for tenant in "tu":
        for name in "abc":
            kept.put(tenant, name, turn(98))
    assert [kept.get("t", name) is not None for name in "abc"] == [False, True, True]
    assert kept.get("t", "b") is not None  # asked for, so it stays longest
    kept.put("t", "d", turn(98))
    assert [kept.get("t", name) is not None for name in "bcd"] == [True, False, True]
    assert kept.size("t") == kept.size("u") == 200
    kept.put("t", "large", turn(300))
    assert kept.get("t", "large") is None and kept.size("t") == 0


def test_a_conversation_is_told_in_order_however_long():
    turns = None
    for i in range(3000):
        turns = KeptTurn(b"", json.dumps([{"role": "user", "content": str(i)}]).encode(), turns)
    kept = Kept(1 << 30)
    kept.put("t", "last", turns)
    assert [message["content"] for message in turns.conversation()] == [str(i) for i in range(3000)]
    assert kept.delete("t", "last") and kept.size("t") == 0


# -- functions and thoughts -------------------------------------------------------------------------------------------

LAMP = {
    "type": "function",
    "name": "lamp",
    "description": "Turn the lamp on or off.",
    "parameters": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}
NAMED = {"type": "function", "name": "lamp"}


@pytest.mark.parametrize("choice", [NAMED, "required", {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}])
def test_a_call_that_must_be_made_is_an_item(ask, choice):
    response = ask("Light!", tools=[LAMP], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=300)
    assert response.status == "completed", response
    (call,) = response.output
    assert (call.type, call.name, call.status) == ("function_call", "lamp", "completed")
    assert isinstance(json.loads(call.arguments)["on"], bool) and call.call_id
    assert response.tools[0].name == "lamp" and response.output_text == ""


def test_results_of_calls_go_back(server, ask):
    """By the response's id, or with all items as they came: the same chat."""
    asked = ask("Light!", tools=[LAMP], tool_choice=NAMED, max_output_tokens=300)
    (call,) = asked.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "The lamp is on."}
    kept = ask([result], previous_response_id=asked.id, tools=[LAMP], tool_choice="none")
    sent = ask([{"role": "user", "content": "Light!"}, call.model_dump(), result], tools=[LAMP], tool_choice="none")
    calls = [{"id": call.call_id, "type": "function", "function": {"name": "lamp", "arguments": call.arguments}}]
    told = chat(
        server,
        [
            {"role": "user", "content": "Light!"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": call.call_id, "content": "The lamp is on."},
        ],
    )
    assert kept.output_text == sent.output_text == text(told)
    assert kept.usage.input_tokens == sent.usage.input_tokens == told["usage"]["prompt_tokens"]


def test_a_streamed_call(client, server):
    with client.responses.stream(
        model=server.name, input="Light!", tools=[LAMP], tool_choice=NAMED, max_output_tokens=300, temperature=0
    ) as stream:
        events = list(stream)
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == events[-1].response.output[0].arguments and all(deltas)


class Scripted:
    """A chat's answer that says what a test wants."""

    def __init__(self, deltas: list[Delta], reason: str = "stop"):
        self.server = SimpleNamespace(settings=SimpleNamespace(name="scripted"))
        self.deltas, self.reason = deltas, reason
        self.choices = [SimpleNamespace(result=SimpleNamespace(usage=Usage()))]

    async def chunks(self, _: Any) -> AsyncIterator[Any]:
        for i, delta in enumerate(self.deltas):
            reason = self.reason if i == len(self.deltas) - 1 else None
            yield SimpleNamespace(choices=[ChatChunkChoice(index=0, delta=delta, finish_reason=reason)])

    def usage(self) -> UsageOut:
        details = Details(
            method="full", computed_tokens=1, document_tokens_computed=0, reused_tokens={}, kv_bytes=0, queued=0,
            encoded=0, ttft=0, decode=0,
        )  # fmt: skip
        cached = PromptDetails(cached_tokens=0)
        return UsageOut(
            prompt_tokens=1, completion_tokens=1, total_tokens=2, prompt_tokens_details=cached, kvgraph=details
        )


def written(deltas: list[Delta], reason: str = "stop") -> tuple[ResponseObject, list[ResponseEvent]]:
    """The response that a chat's chunks come to, and its events."""

    async def nothing() -> AsyncIterator[Any]:
        return
        yield

    async def gather() -> list[ResponseEvent]:
        return [event async for event in answer.events(nothing())]

    answer = ResponseAnswer(ResponseRequest(model="scripted", input="x"), Scripted(deltas, reason), lambda _: None)
    return answer.response, asyncio.run(gather())


def test_thoughts_text_and_calls_follow_each_other():
    def call(index: int, **more: Any) -> Delta:
        function = FunctionOut(name=more.get("name"), arguments=more.get("arguments", ""))
        return Delta(tool_calls=[ToolCallDelta(index=index, id=more.get("id"), function=function)])

    _, events = written(
        [
            Delta(role="assistant", content=""),
            Delta(reasoning_content="Hm"),
            Delta(reasoning_content="m."),
            Delta(content="I "),
            Delta(content="see."),
            call(0, id="call_a", name="lamp"),
            call(0, arguments='{"on":'),
            call(0, arguments="true}"),
            call(1, id="call_b", name="lamp", arguments="{}"),
            Delta(),
        ],
        "tool_calls",
    )
    last = events[-1].response
    assert events[-1].type == "response.completed" and [event.sequence_number for event in events] == [
        *range(len(events))
    ]
    assert [item.type for item in last.output] == ["reasoning", "message", "function_call", "function_call"]
    thoughts, message, first, second = last.output
    assert (thoughts.content[0].text, message.content[0].text) == ("Hmm.", "I see.")
    assert (first.call_id, first.arguments, second.call_id, second.arguments) == (
        "call_a",
        '{"on":true}',
        "call_b",
        "{}",
    )
    assert {item.status for item in last.output} == {"completed"}
    for index, item in enumerate(last.output):
        mine = [event.type.removeprefix("response.") for event in events if event.output_index == index]
        assert (mine[0], mine[-1]) == ("output_item.added", "output_item.done")
        assert {event.item_id for event in events if event.output_index == index and event.item_id} == {item.id}
    assert last.messages() == [
        {
            "role": "assistant",
            "content": "I see.",
            "reasoning_content": "Hmm.",
            "tool_calls": [
                {"id": "call_a", "type": "function", "function": {"name": "lamp", "arguments": '{"on":true}'}},
                {"id": "call_b", "type": "function", "function": {"name": "lamp", "arguments": "{}"}},
            ],
        }
    ]
    sent = ResponseRequest(model="m", input=[{"role": "user", "content": "x"}, *(i.model_dump() for i in last.output)])
    assert sent.messages()[1:] == last.messages()  # what came can be sent back


def test_an_answer_cut_short_is_incomplete_in_its_last_item_alone():
    _, events = written([Delta(reasoning_content="Hm"), Delta(content="I")], "length")
    last = events[-1].response
    assert [item.status for item in last.output] == ["completed", "incomplete"]
    assert (last.status, last.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_an_empty_answer_is_an_empty_message():
    _, events = written([Delta(role="assistant", content="")])
    (item,) = events[-1].response.output
    assert (item.type, item.content[0].text, item.status) == ("message", "", "completed")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": []}, "input", "invalid_value"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "unsupported_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input.0.content.0.type", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "missing_required_parameter"),
        ({"max_tokens": 5}, "max_tokens", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"reasoning": {"effort": "hard"}}, "reasoning.effort", "invalid_value"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing_required_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}},
         "text.format", "invalid_value"),
        ({"tools": [LAMP], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name", "invalid_value"),
        ({"tools": [LAMP | {"parameters": {"properties": {"on": {"type": "nothing"}}}}], "tool_choice": NAMED},
         "tools.0.parameters", "invalid_value"),
        ({"tools": [LAMP]}, "tools", "unsupported_parameter"),
        ({"max_output_tokens": 0}, "max_output_tokens", "number_below_min_value"),
        ({"model": "gpt-5"}, "model", "model_not_found"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)  # fmt: skip
def test_errors_name_the_field(server, fields, param, code):
    told = error(post(server, **fields), 404 if param == "model" else 400)
    assert (told["param"], told["code"]) == (param, code)
    assert "max_output_tokens" in told["message"] or param != "max_tokens"
    assert "response_format" not in told["message"]


def test_what_asks_for_nothing_is_taken(ask):
    fields = {
        "background": False, "metadata": {}, "parallel_tool_calls": True, "reasoning": {"effort": None, "summary": "auto"},
        "include": ["reasoning.encrypted_content"], "service_tier": "auto", "tool_choice": "auto", "tools": [],
        "truncation": "disabled", "user": "u", "prompt_cache_key": "k", "safety_identifier": "s",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
    }  # fmt: skip
    answer = ask(**fields)
    assert answer.output_text == ask().output_text
    assert "ignored" not in answer.usage.model_extra["kvgraph"]
    unknown = ask(extra_body={"foo": 1}).usage.model_extra["kvgraph"]
    assert unknown["ignored"] == ["foo"]
