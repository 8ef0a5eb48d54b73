"""Calls as models write them: real spellings, hostile ones, and the same whatever the pieces a text comes in."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgraph.server.tools.asked import Function
from kvgraph.server.tools.base import ToolFormat
from kvgraph.server.tools.dialect import Dialect, dialect_of
from kvgraph.server.tools.reading import Event, Marks, Message, Reading, Said, message
from kvgraph.server.tools.registry import FORMATS, format_of
from soak import draws
from template_tokenizer import tokenizer
from tool_templates import ELEMENTS, PLAIN, WITH_TOOLS

NAMES = frozenset({"get_weather", "get_time"})
THINK = Marks("<think>", "</think>")
PARIS = ("get_weather", '{"city": "Paris"}')
TIME = ("get_time", "{}")
Read = tuple[str, str, list[tuple[str, str]]]


def said(found: Message) -> Read:
    return found.text, found.thoughts, [(call.name, call.arguments) for call in found.calls]


def read(reading: Reading, *pieces: str) -> Read:
    reader = reading.reader()
    events: list[Event] = [event for piece in pieces for event in reader.feed(piece)]
    events += reader.end()
    return said(message(events))


def alike(reading: Reading, text: str) -> Read:
    """What is read of a text, which is the same in one piece, in two wherever it is cut, and in single characters."""
    whole = read(reading, text)
    assert read(reading, *text) == whole
    for at in range(len(text) + 1):
        assert read(reading, text[:at], text[at:]) == whole, (text[:at], text[at:])
    return whole


def reading(name: str, **more: Any) -> Reading:
    return Reading(FORMATS[name], NAMES, thoughts=THINK, **more)


CALLS: list[tuple[str, str, str, list[tuple[str, str]]]] = [  # format, text, content, calls
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
    ("hermes", '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', "", [PARIS]),
    ("hermes", 'Let me look.\n\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>', "Let me look.", [TIME]),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>\n',
        "",
        [PARIS, TIME],
    ),
    ("hermes", '<tool_call>\n{"name": "get_time", "arguments": {}}', "", [TIME]),  # the end instead of the last mark
    ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": null}</tool_call>', "", [TIME]),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        "",
        [PARIS],
    ),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call> \\"}\\\\"}}</tool_call> There.',
        " There.",
        [("get_weather", '{"city": "</tool_call> \\"}\\\\"}')],
    ),
    ("hermes", '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time"}]</tool_call>', "", [PARIS, TIME]),
    ("hermes", '<think>\nParis.\n</think>\n\n<tool_call>{"name": "get_time"}</tool_call>', "", [TIME]),
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama", '\n{"type": "function", "name": "get_time", "parameters": {}}', "", [TIME]),
    ("llama", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "get_time", "parameters": {}}', "", [PARIS, TIME]),
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}\n{"name": "get_time"}\n', "", [PARIS, TIME]),
    ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "Ab1Cd2Ef3"}, {"name": "get_time", "arguments": {}}]', "", [PARIS, TIME]),
    ("mistral", 'Well. [TOOL_CALLS][{"name": "get_time", "arguments": {}}', "Well.", [TIME]),
    ("mistral-args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}', "", [PARIS, TIME]),
    ("mistral-args", '[TOOL_CALLS]get_weather[CALL_ID]Ab1Cd2Ef3[ARGS]{"city": "Paris"}', "", [PARIS]),
    ("mistral-args", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", [PARIS]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), CALLS, ids=[f"{c[0]} {i}" for i, c in enumerate(CALLS)])
def test_real_spellings(name, text, content, calls):
    found = alike(reading(name), text)
    assert (found[0], found[2]) == (content, calls)


TEXTS = {  # by format: what begins like a call and is none stays a text
    "hermes": [
        "<tool_call>",
        "a <tool_cal",
        "<tool_call>get_weather</tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "get_weather", "arguments": {"city": Paris}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
        '<tool_call>{"name": "get_weather", "arguments": {"n": NaN}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": "Paris"}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_time", "name": "get_time", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_time", "arguments": {}, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_time", "arguments": {}} and so on</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_time" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
    ],
    "llama": [
        "{",
        "<|python_tag|>",
        "<|python_tag|>print(1)",
        '{"city": "Paris"}',
        '{"name": "get_weather", "parameters": {"city": "Paris"}} is what I would call.',
        'I would call {"name": "get_weather", "parameters": {}}',
        '{"name": "Paris", "parameters": {}}',
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS][]",
        '[TOOL_CALLS][{"name": "get_time"}, 5]',
        '[TOOL_CALLS][{"name": "get_time"} {"name": "get_time"}]',
        "[TOOL_CALLS]get_time",
        "[TOOL_CALLS]get_time[ARGS]",
        '[TOOL_CALLS]get_time[ARGS]"x"',
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts])
def test_what_is_no_call_is_text(name, text):
    assert alike(reading(name), text) == (text, "", [])


def test_a_good_call_after_a_bad_one():
    bad, good = "<tool_call>oops</tool_call>\n", '<tool_call>{"name": "get_time"}</tool_call>'
    assert alike(reading("hermes"), bad + good) == (bad.rstrip(), "", [TIME])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" + '{"a":' * 4_000,
        "<tool_call>" * 2_000,
        '<tool_call>{"name": "' * 4_000,
        '<tool_call>{"name": "get_time", "arguments": {"a": ' + "9" * 20_000 + "}}</tool_call>",
        '<tool_call>{"name": "get_time", "arguments": ' + '{"a":' * 4_000 + "}" * 4_000 + "}</tool_call>",
        "[TOOL_CALLS][" * 2_000,
        "{" * 20_000,
        "<" * 20_000,
        " " * 20_000,
        "<think>" * 2_000,
    ],
    ids=lambda text: text[:40],
)
def test_hostile_texts_are_read_in_linear_time(text):
    """A reader that reads again what it has read would take very long for these."""
    began = time.process_time()
    for name in FORMATS:
        pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
        assert read(reading(name), *pieces) == read(reading(name), text)
    assert time.process_time() - began < 60


FORMS = st.sampled_from(sorted(FORMATS))
SCRAPS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<think>", "</think>", "{", "}", "[", "]",
     '"', "\\", ",", ":", ";", " ", "\n", '"name"', '"arguments"', '"parameters"', '"get_time"', "get_time", "{}", "null", "1", "é", "\u2028",
     '{"name": "get_time", "arguments": {}}', '{"name": "get_weather", "parameters": {"city": "x"}}', "<tool", "[TOOL"]
)  # fmt: skip


@given(FORMS, st.lists(SCRAPS, max_size=14), st.booleans(), st.integers(1, 5), st.sampled_from([None, 1]))
@settings(max_examples=draws(150), deadline=None)
def test_pieces_make_no_difference_and_nothing_is_lost(name, scraps, thinking, size, most):
    text = "".join(scraps)
    how = reading(name, thinking=thinking, most=most)
    whole = read(how, text)
    assert read(how, *(text[i : i + size] for i in range(0, len(text), size))) == whole
    content, thoughts, calls = whole
    for function, arguments in calls:
        assert function in NAMES and isinstance(json.loads(arguments), dict)
    assert most is None or len(calls) <= most
    if not calls and not thinking and not text.lstrip().startswith("<think>"):
        assert (content, thoughts) == (text, "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


def written(form: ToolFormat, calls: list[tuple[str, str]]) -> str:
    """Calls as they are forced."""
    each = [form.head(name) + arguments + form.tail for name, arguments in calls]
    return form.opening + (form.between or "").join(each) + form.closing


@given(FORMS, st.lists(st.tuples(st.sampled_from(sorted(NAMES)), OBJECTS), min_size=1, max_size=3), st.booleans())
@settings(max_examples=draws(50), deadline=None)
def test_forced_calls_are_read_as_they_were_written(name, calls, guided):
    form = FORMATS[name]
    given_calls = [(function, json.dumps(arguments, ensure_ascii=False)) for function, arguments in calls]
    text = written(form, given_calls)
    how = reading(name, guided=guided, forced=guided)
    assert read(how, text) == read(how, *text) == ("", "", given_calls)


def test_a_guided_call_is_told_as_it_comes():
    reader = reading("hermes", guided=True, forced=True).reader()
    shown = [reader.feed(piece) for piece in ('<tool_call>\n{"name": "get_', 'weather", "arguments": {"ci', 'ty": "Pa')]
    assert [len(events) for events in shown] == [0, 2, 1]
    assert shown[1][0].name == "get_weather" and shown[1][1].text + shown[2][0].text == '{"city": "Pa'
    assert reader.end() == []  # cut short: what there is of the arguments was told


def test_a_free_call_is_told_when_it_is_complete():
    reader = reading("hermes").reader()
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert all(reader.feed(char) == [] for char in text[:-1])
    assert len(reader.feed(text[-1])) == 2


def test_only_so_many_calls_are_told():
    text = '<tool_call>{"name": "get_time"}</tool_call>' * 3
    assert alike(reading("hermes", most=1), text) == ("", "", [TIME])


def test_thoughts_are_apart():
    plain = Reading(thoughts=THINK)
    assert alike(plain, "<think>\nSo.\n\nYes.\n</think>\n\nParis.\n") == ("Paris.\n", "So.\n\nYes.", [])
    assert alike(plain, "Paris. <think>no</think>") == ("Paris. <think>no</think>", "", [])
    assert alike(plain, "<think>\n\n</think>\n\nParis.") == ("Paris.", "", [])
    assert alike(plain, "<think>cut sho") == ("", "cut sho", [])
    within = Reading(thoughts=THINK, thinking=True)
    assert alike(within, "So.\n</think>\n\nParis.") == ("Paris.", "So.", [])
    assert Reading().reader().feed(" <think>x") == [Said(" <think>x")]


# -- templates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_template_shows_its_dialect(name):
    found = dialect_of(tokenizer(WITH_TOOLS[name]))
    form = {"llama": "llama", "mistral": "mistral", "mistral-args": "mistral-args"}.get(name, "hermes")
    assert found.tools and found.calls and found.results and found.format is FORMATS[form]
    assert (found.short, found.text) == (name == "mistral", name == "textual")
    assert (found.thoughts is None) == (name not in ("thinks", "thinking"))


def test_templates_without_tools_or_with_other_calls():
    assert dialect_of(tokenizer(PLAIN)) == Dialect() and dialect_of(tokenizer(None)) == Dialect()
    other = dialect_of(tokenizer(ELEMENTS))
    assert other.tools and other.calls and other.format is None and other.forced is not None


def test_a_template_that_describes_a_format_and_writes_another_is_not_believed():
    described = ELEMENTS.replace("You may call", '<tool_call>{\\"name\\": \\"x\\"}</tool_call> You may call')
    assert dialect_of(tokenizer(described)).format is None
    assert format_of("call f(x)") is None


TALK = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": PARIS[0], "arguments": PARIS[1]}}],
    },
    {"role": "tool", "content": "Sunny.", "tool_call_id": "call_1"},
]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_history_is_written_as_answers_are_read(name):
    t = tokenizer(WITH_TOOLS[name])
    dialect = dialect_of(t)
    text = t.apply_chat_template(dialect.messages(TALK), tokenize=False, add_generation_prompt=True)
    answer = text[: text.index("Sunny.")].split("Weather?")[1]
    begun = min(answer.index(mark) for mark in dialect.format.opens if mark in answer)
    answer = answer[begun:].split("<|im_end|>")[0].split("<|eot|>")[0].split("</s>")[0]
    found = read(Reading(dialect.format, NAMES), answer)
    assert found[0] == "" and [(n, json.loads(a)) for n, a in found[2]] == [("get_weather", {"city": "Paris"})]


def test_ids_stay_equal_where_a_template_wants_short_ones():
    dialect = dialect_of(tokenizer(WITH_TOOLS["mistral"]))
    _, answer, result = dialect.messages(TALK)
    assert answer["tool_calls"][0]["id"] == result["tool_call_id"] and len(result["tool_call_id"]) == 9
    assert result["name"] == "get_weather"


def test_a_template_without_tools_gets_text():
    messages = Dialect().messages(TALK)
    assert [m["role"] for m in messages] == ["user", "assistant", "user"] and "tool_calls" not in messages[1]
    assert read(Reading(FORMATS["hermes"], NAMES), messages[1]["content"])[2] == [PARIS]
    assert "Sunny." in messages[2]["content"]


def test_functions_take_what_they_declare():
    none = {"type": "object", "properties": {}, "additionalProperties": False}
    assert Function("f").schema() == Function("f", parameters={"type": "object", "properties": {}}).schema() == none
    inner = {"type": "object", "properties": {"x": {"type": "object"}}}
    found = Function("f", parameters={"properties": {"a": {"items": inner}}, "$defs": {"b": inner}}).schema()
    shut = {**inner, "additionalProperties": False}
    assert found == {
        "properties": {"a": {"items": shut}},
        "$defs": {"b": shut},
        "type": "object",
        "additionalProperties": False,
    }
    for given_schema in (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]},
        {"type": "object", "properties": {"a": {"allOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]}}},
        {"type": "object"},
    ):
        assert Function("f", parameters=given_schema).schema() == given_schema
