"""Guided answers: of random schemas, regular expressions and grammars, by a random model over a tokenizer with merges."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import jsonschema_rs
import pytest
import regex
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

import families
from kvgraph import ContextGraph, Engine, SamplingParams, demo, models
from kvgraph.engine import guide
from kvgraph.engine.guide import Grammar, GrammarError
from kvgraph.engine.result import Result

SOAK = os.environ.get("KVGRAPH_SOAK", "0") not in ("", "0")
TEXT = ['{"name": "a", "value": [1, 2, true, false, null]}, {"name": "b"}', "the cat sat\n  on the mat; 10.5e3 "] * 4


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, 150 merges of what JSON has, and two special tokens; there is a token such as `"}, {"`."""
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|other|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=410, min_frequency=1, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = tokenizer()
    hf = families.build("Llama", vocab_size=len(made) + 5, eos_token_id=made.eos_token_id)  # rows that nothing names
    with Engine(models.wrap(hf, made), kv_budget=1 << 26) as engine:
        yield engine


def ask(engine: Engine, grammar: Grammar | None, seed: int = 0, **params: Any) -> Result:
    params = {"max_tokens": 3000, "temperature": 1.0, "seed": seed} | params
    return engine.generate(ContextGraph([], "What is it?"), "full", grammar=grammar, **params)


def closing(engine: Engine) -> dict[int, float]:
    """A bias to what ends things, so that strings, lists and numbers of a random model don't go on for ever."""
    ends = {engine.tokenize(text)[0]: 8.0 for text in '"}]'}
    return ends | {engine.model.eos_ids[0]: 20.0}


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """JSON schemas of the keywords that structured output is used with."""
    name = st.text('abcxyz_ é"\\{', min_size=1, max_size=4)
    exact = st.integers(-(1 << 53), 1 << 53)  # others are refused
    leaf = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string"}, {"type": "number"}]),
        st.integers(-20, 20).flatmap(
            lambda low: st.integers(low, 60).map(lambda high: {"type": "integer", "minimum": low, "maximum": high})
        ),
        st.tuples(st.integers(0, 3), st.integers(3, 6)).map(
            lambda n: {"type": "string", "minLength": n[0], "maxLength": n[1]}
        ),
        st.sampled_from(["^[a-f]{2,4}$", "^\\d+(\\.\\d{2})?$", "^(yes|no) é$"]).map(
            lambda p: {"type": "string", "pattern": p}
        ),
        st.lists(st.one_of(st.none(), exact, name, st.booleans()), min_size=1, max_size=4).map(
            lambda values: {"enum": values}
        ),
        st.one_of(exact, name, st.just({"a": [1, None]})).map(lambda value: {"const": value}),
        st.sampled_from(["date", "uuid", "ipv4"]).map(lambda f: {"type": "string", "format": f}),
    )

    def deeper(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        objects = st.dictionaries(name, inner, max_size=4).flatmap(
            lambda fields: (
                st.lists(st.sampled_from(sorted(fields)), unique=True).map(
                    lambda needed: {
                        "type": "object",
                        "properties": fields,
                        "required": needed,
                        "additionalProperties": False,
                    }
                )
                if fields
                else st.just({"type": "object", "additionalProperties": False})
            )
        )
        lists = st.tuples(inner, st.integers(0, 2), st.integers(2, 4)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[2]}
        )
        pairs = st.lists(inner, min_size=1, max_size=3).map(
            lambda parts: {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
        )
        either = st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
        return st.one_of(objects, lists, pairs, either)

    return st.recursive(leaf, deeper, max_leaves=8)


@settings(max_examples=1000 if SOAK else 10, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=schemas(), seed=st.integers(0, 1 << 30))
def test_every_answer_is_valid_under_its_schema(engine, schema, seed):
    result = ask(engine, Grammar.json_schema(schema), seed, logit_bias=closing(engine))
    assert result.finish_reason == "stop", result.text[-200:]
    jsonschema_rs.validate(schema, json.loads(result.text, parse_float=within_doubles), validate_formats=True)


def within_doubles(text: str) -> float:
    """JSON has numbers beyond those of 64 bits; the validator would take them for nulls."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))


@pytest.mark.parametrize("number", [(1 << 53) + 1, -(1 << 63) + 1, 10**400])
def test_a_number_that_floats_do_not_hold_is_refused(engine, number):
    for schema in ({"const": number}, {"enum": [1, number]}, {"properties": {"a": {"const": [number]}}}):
        with pytest.raises(GrammarError, match=r"can't be told from those beside it; up to 2\*\*53 it can"):
            engine.scheduler.guides.guide(Grammar.json_schema(schema))
    engine.scheduler.guides.guide(Grammar.json_schema({"enum": [1 << 53, 1 << 60]}))


@pytest.mark.parametrize(("low", "high"), [(-(1 << 63) + 1, (1 << 63) - 1), ((1 << 60) + 1, (1 << 60) + 999)])
def test_limits_that_floats_do_not_hold_lie_inside(engine, low, high):
    schema = {"type": "integer", "minimum": low, "maximum": high}
    guides = engine.scheduler.guides
    for value in (low - 1, low - 600, high + 1, high + 600):
        found = guides.guide(Grammar.json_schema(schema)).matcher
        tokens = engine.tokenize(str(value))
        assert found.try_consume_tokens(tokens) < len(tokens) or not found.is_accepting(), value
    inside = guides.guide(Grammar.json_schema(schema)).matcher
    tokens = engine.tokenize(str((low + high) // 2))
    assert inside.try_consume_tokens(tokens) == len(tokens) and inside.is_accepting()


def any_schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Keywords of all kinds side by side, also such as contradict each other or can't be enforced."""
    count, number = st.integers(0, 4), st.integers(-30, 60)
    values = st.sampled_from([0, 1.5, "a", 'é"\\', None, True, [1], {"b": 2}])
    types = ["string", "integer", "number", "boolean", "null", "array", "object"]
    simple: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from([*types, ["string", "null"]]),
        "enum": st.lists(values, min_size=1, max_size=3),
        "const": values,
        "minimum": number,
        "exclusiveMaximum": number,
        "multipleOf": st.sampled_from([1, 2, 5, 0.5]),
        "minLength": count,
        "maxLength": count,
        "pattern": st.sampled_from(["^[a-f]{2,4}$", "\\d", "^x"]),
        "format": st.sampled_from(["date", "date-time", "email", "uuid", "ipv4"]),
        "title": st.text(max_size=3),
    }

    def some(fields: dict[str, st.SearchStrategy[Any]], least: int = 0) -> st.SearchStrategy[dict[str, Any]]:
        names = st.lists(st.sampled_from(sorted(fields)), unique=True, min_size=least, max_size=4)
        return names.flatmap(lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen}))

    def deeper(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        listed = st.lists(inner, min_size=1, max_size=3)
        parts: dict[str, st.SearchStrategy[Any]] = {
            "properties": st.dictionaries(st.sampled_from("abé"), inner, max_size=3),
            "patternProperties": st.dictionaries(st.just("^x"), inner, max_size=1),
            "required": st.lists(st.sampled_from("abéz"), unique=True),
            "additionalProperties": st.booleans() | inner,
            "minProperties": count,
            "maxProperties": count,
            "items": inner | st.booleans(),
            "prefixItems": listed,
            "minItems": count,
            "maxItems": count,
            "uniqueItems": st.booleans(),
            "contains": inner,
            "anyOf": listed,
            "oneOf": listed,
            "allOf": listed,
            "not": inner,
        }
        typed = some(parts, 1).flatmap(lambda found: some(simple).map(lambda more: more | found))
        kinds = st.sampled_from(["array", "object"])
        return st.tuples(typed, kinds | st.none()).map(lambda t: t[0] if t[1] is None else t[0] | {"type": t[1]})

    return st.recursive(some(simple, 1), deeper, max_leaves=6)


@settings(max_examples=1000 if SOAK else 12, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=any_schemas(), seed=st.integers(0, 1 << 30))
def test_an_answer_is_valid_under_any_schema_that_isnt_refused(engine, schema, seed):
    """Whatever keywords stand together."""
    try:
        result = ask(engine, Grammar.json_schema(schema), seed, logit_bias=closing(engine))
    except GrammarError as error:
        assert str(error) and "\n" not in str(error)
        event("refused")
        return
    event("answered")
    assert result.finish_reason == "stop", result.text[-200:]
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    validator.validate(json.loads(result.text))


@settings(max_examples=1000 if SOAK else 20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), schema=schemas())
def test_what_is_valid_may_be_answered(engine, data, schema):
    """A guide is no narrower than its schema: of objects, in the order of the properties."""
    value = data.draw(values(schema))
    jsonschema_rs.validate(schema, value, validate_formats=True)
    found = engine.scheduler.guides.guide(Grammar.json_schema(schema))
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # a guide never writes DEL as it is
    tokens = engine.tokenize(text)
    assert found.matcher.try_consume_tokens(tokens) == len(tokens) and found.matcher.is_accepting(), value


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that are valid under one of `schemas`."""
    if "anyOf" in schema:
        return st.one_of([values(part) for part in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if schema["type"] == "object":
        fields = schema.get("properties", {})
        chosen = {name: values(part) for name, part in fields.items()}
        left_out = st.sets(st.sampled_from(sorted(set(fields) - set(schema.get("required", ()))) or [""]))
        return st.tuples(st.fixed_dictionaries(chosen), left_out).map(
            lambda t: {name: t[0][name] for name in fields if name not in t[1]}
        )
    if "prefixItems" in schema:
        return st.tuples(*map(values, schema["prefixItems"])).map(list)
    if schema["type"] == "array":
        return st.lists(values(schema["items"]), min_size=schema["minItems"], max_size=schema["maxItems"])
    if schema["type"] == "string":
        formats = {
            "date": st.dates().map(str),
            "uuid": st.uuids().map(str),
            "ipv4": st.ip_addresses(v=4).map(str),
        }
        if "format" in schema:
            return formats[schema["format"]]
        if "pattern" in schema:
            return st.from_regex(schema["pattern"].replace("\\d", "[0-9]").removesuffix("$"), fullmatch=True)
        text = st.characters(exclude_categories=["Cs"])
        return st.text(text, min_size=schema.get("minLength", 0), max_size=schema.get("maxLength", 8))
    if schema["type"] == "integer":
        return st.integers(schema["minimum"], schema["maximum"])
    floats = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda x: "e" not in repr(x))
    return {"boolean": st.booleans(), "null": st.none(), "number": floats | st.integers(-1000, 1000)}[schema["type"]]


def expressions() -> st.SearchStrategy[str]:
    """Regular expressions that Python's `re` and Rust's read alike."""
    leaf = st.sampled_from(["a", "b", "the cat", "é", r"\d", "[a-c]", "[^x\\n]", r"\.", '"', "/", " ", r"\{"])

    def deeper(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        several = st.lists(inner, min_size=1, max_size=3)
        count = st.sampled_from(["?", "{2}", "{1,3}", "*", "+"])
        return st.one_of(
            several.map("".join),
            several.map(lambda parts: f"({'|'.join(parts)})"),
            st.tuples(inner, count).map(lambda t: f"({t[0]}){t[1]}"),
        )

    return st.recursive(leaf, deeper, max_leaves=6)


@settings(max_examples=1000 if SOAK else 20, deadline=None, suppress_health_check=list(HealthCheck))
@given(expression=expressions(), seed=st.integers(0, 1 << 30))
def test_every_answer_matches_its_expression(engine, expression, seed):
    result = ask(engine, Grammar("regex", expression), seed, logit_bias=closing(engine))
    event(result.finish_reason)
    if result.finish_reason == "length":  # some expressions end with words that a random model hardly ever writes
        return
    assert regex.fullmatch(expression, result.text), result.text[
        -200:
    ]  # it knows Unicode's newest digits, as Rust does


def test_a_lark_grammar(engine):
    grammar = Grammar("lark", 'start: "(" (start | WORD)? ")"\nWORD: /[a-z]{1,5}/')
    texts = [ask(engine, grammar, seed, logit_bias=closing(engine)).text for seed in range(10)]
    assert len(set(texts)) > 3
    for text in texts:
        inner = text.strip("()")
        depth = (len(text) - len(inner)) // 2
        assert text == "(" * depth + inner + ")" * depth and depth and re.fullmatch("[a-z]{0,5}", inner)


def test_a_choice_may_hold_anything_that_is_text(engine):
    texts = ["a b", 'say "é"\n', "/", "\\d"]
    answers = {ask(engine, Grammar.choice(texts), seed).text for seed in range(40)}
    assert answers == set(texts)


def test_a_json_object(engine):
    for seed in range(5):
        text = ask(engine, Grammar.json_object(), seed, logit_bias=closing(engine)).text
        assert isinstance(json.loads(text), dict)


def test_the_choice_is_the_best_of_the_tokens_whose_text_the_grammar_allows(engine):
    """Against a reference that tries every token's text: tokens that reach beyond a part of the grammar included. Text that
    can't be otherwise comes in the tokens that it is tokenized to, whatever their logits.
    """
    names = ["name", "value", "nam", "na\u00efve"]
    texts = {json.dumps({name: value}, ensure_ascii=False) for name in names for value in (None, True)}
    result = ask(engine, Grammar.choice(texts), temperature=0.0)
    prompt, so_far = engine.tokenize("What is it?"), b""
    pieces = [piece_of(engine, token) for token in range(engine.model.vocab_size)]
    bytes_of, chosen = [text.encode() for text in texts], 0
    for token in result.token_ids:
        logits = engine.logits(engine.plan(ContextGraph([], prompt), "full"))
        fine = [t for t, p in enumerate(pieces) if p and any(b.startswith(so_far + p) for b in bytes_of)]
        assert token in fine
        if not os.path.commonprefix([b[len(so_far) :] for b in bytes_of if b.startswith(so_far)]):
            chosen += 1
            assert logits[token] >= logits[fine].max() - 1e-4  # batches change last bits
        prompt, so_far = [*prompt, token], so_far + pieces[token]
    assert so_far in bytes_of and result.finish_reason == "stop" and chosen
    assert any(len(pieces[token]) > 2 for token in result.token_ids)


def piece_of(engine: Engine, token: int) -> bytes:
    """The bytes of a token; none of one that is special or isn't in the vocabulary."""
    name = engine.model.tokenizer.convert_ids_to_tokens(token)
    if name is None or name.startswith("<|"):
        return b""
    alphabet = {ord(c): i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet(), key=byte_of))}
    return bytes(alphabet[ord(c)] for c in name)


def byte_of(char: str) -> int:
    """The byte that GPT-2's alphabet writes as this character."""
    others = [b for b in range(256) if not (0x21 <= b < 0x7F or 0xA1 <= b < 0xAD or b >= 0xAE)]
    return others[ord(char) - 256] if ord(char) >= 256 else ord(char)


def test_it_ends_where_the_grammar_ends(engine):
    plain = Grammar("regex", "(cat ){3}")
    result = ask(engine, plain, ignore_eos=True, min_tokens=500)
    assert (result.text, result.finish_reason) == ("cat cat cat ", "stop")
    assert engine.model.eos_ids[0] not in result.token_ids  # nothing else could come: it isn't even asked
    longer = ask(engine, Grammar("regex", "a*"), min_tokens=20, logit_bias=closing(engine))
    assert len(longer.token_ids) > 20 and set(longer.text) == {"a"} and longer.finish_reason == "stop"
    assert ask(engine, plain, max_tokens=2).finish_reason == "length"


def test_a_stop_string_cuts_what_is_guided(engine):
    grammar = Grammar("regex", "(the cat|, )+")
    whole = ask(engine, grammar, max_tokens=60)
    cut = ask(engine, grammar, max_tokens=60, stop=("cat, ", "t, t"))
    at = min(whole.text.index(stop) for stop in ("cat, ", "t, t") if stop in whole.text)
    assert cut.text == whole.text[:at] and cut.finish_reason == "stop"
    schema = Grammar.json_schema({"type": "array", "items": {"const": "end"}, "minItems": 2, "maxItems": 2})
    assert (
        ask(engine, schema, stop=("]x",)).text.replace(" ", "").replace("\n", "") == '["end","end"]'
    )  # held, then shown


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guided_and_plain_requests_share_steps_and_change_nothing(engine, temperature):
    grammars = [None, Grammar("regex", "[a-z ]{30}"), Grammar.json_object(), None, Grammar("regex", "[a-z ]{30}")]
    params = {"max_tokens": 24, "temperature": temperature, "logit_bias": {}}
    alone = [ask(engine, grammar, seed, **params) for seed, grammar in enumerate(grammars)]
    plan = engine.plan(ContextGraph([], "What is it?"), "full")
    requests = [engine.submit(plan, guided(grammar, seed=seed, **params)) for seed, grammar in enumerate(grammars)]
    together = [engine.wait(request) for request in requests]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def guided(grammar: Grammar | None, **params: Any) -> SamplingParams:
    return SamplingParams(grammar=grammar, **params)


def test_logprobs_are_the_models_own(engine):
    plan = engine.plan(ContextGraph([], "What is it?"), "full")
    result = ask(engine, Grammar("regex", "zz"), logprobs=3)
    logprobs = engine.logits(plan).log_softmax(-1)
    assert result.sampled[0].logprob == pytest.approx(float(logprobs[result.token_ids[0]]), abs=1e-4)
    assert result.sampled[0].top[0][0] == int(logprobs.argmax())


@pytest.mark.parametrize(
    ("schema", "path", "says"),
    [
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, ("properties", "a"), "strin"),
        ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"not": {}}}]}, ("anyOf", 1, "items"), "not"),
        ({"$defs": {"x": {"type": "string", "pattern": "a(b"}}, "$ref": "#/$defs/x"}, ("$defs", "x"), "unclosed group"),
        ({"properties": {"a": {"$ref": "#/nope"}}}, ("properties", "a"), "/nope"),
        ({"enum": []}, (), "Unsatisfiable"),
        ({"type": "array", "uniqueItems": True}, (), "uniqueItems"),
    ],
)
def test_what_cant_be_compiled_says_where(engine, schema, path, says):
    with pytest.raises(GrammarError, match=says) as caught:
        engine.scheduler.guides.guide(Grammar.json_schema(schema))
    assert caught.value.path == path and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("defs", "part", "count"),
    [({"a": {"const": "x" * 40_000}}, {"$ref": "#/$defs/a"}, 100), ({}, {}, 4000)],
    ids=["large definitions", "many parts"],
)
def test_naming_what_cant_be_compiled_ends_after_some_parts_and_is_done_once(engine, monkeypatch, defs, part, count):
    guides, made = guide.Guides(engine.model), []
    compiled = guides._matcher
    monkeypatch.setattr(guides, "_matcher", lambda grammar: made.append(len(grammar.text)) or compiled(grammar))
    parts = {f"p{i}": part for i in range(count)} | {"bad": {"type": "strin"}}
    for _ in range(2):
        with pytest.raises(GrammarError, match="strin") as caught:
            guides.guide(Grammar.json_schema({"$defs": defs, "properties": {"all": {"properties": parts}}}))
        assert caught.value.path == ("properties", "all")
        assert 10 < len(made) < count * 0.6 and sum(made) < guide.SEARCHED + 2 * guide.LONGEST
        monkeypatch.setattr(guides, "_matcher", lambda grammar: pytest.fail("it was refused before"))


@pytest.mark.parametrize(
    "grammar", [Grammar("regex", "a(b"), Grammar("lark", "start: foo"), Grammar("json_schema", "true")]
)
def test_no_grammar_ends_the_process_or_runs(engine, grammar):
    with pytest.raises(GrammarError):
        ask(engine, grammar)


def test_references_upon_references(engine):
    """The compiler follows them by recursion: on a thread's usual stack, so many end the process."""
    links = {f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1600)}
    schema = {"$defs": links | {"a1600": {"const": 1}}, "$ref": "#/$defs/a0"}
    assert ask(engine, Grammar.json_schema(schema), max_tokens=3).text.startswith("{")
    with pytest.raises(GrammarError, match="may have 131072 characters"):
        ask(engine, Grammar("regex", "a" * (guide.LONGEST + 1)))


def test_a_grammar_is_compiled_once(engine, monkeypatch):
    guides, made = guide.Guides(engine.model), []
    compiled = guides._matcher
    monkeypatch.setattr(guides, "_matcher", lambda grammar: made.append(grammar) or compiled(grammar))
    for _ in range(3):
        guides.guide(Grammar("regex", "a" * 3))
    assert made == [Grammar("regex", "aaa")]
    for i in range(guide.KEPT + 1):
        guides.guide(Grammar.choice([str(i)]))
    assert len(guides._compiled) == guide.KEPT


def test_a_model_whose_tokens_are_no_bytes_says_so():
    with Engine(models.load(demo.model()), kv_budget=1 << 26) as engine:
        with pytest.raises(GrammarError, match="answers of this model can't be guided"):
            ask(engine, Grammar("regex", "a"))


def test_a_grammar_that_no_token_continues_ends_its_own_request(engine):
    """A vocabulary may lack a byte; here, every way on is closed by the model itself."""
    plan = engine.plan(ContextGraph([], "What is it?"), "full")
    other = engine.submit(plan, SamplingParams(max_tokens=5, ignore_eos=True))
    failing = engine.submit(plan, guided(Grammar("regex", "ab"), max_tokens=5))
    assert failing.guide is not None
    failing.guide.matcher.consume_token(engine.tokenize("z")[0])  # which breaks it
    with pytest.raises(GrammarError, match="no token of this model continues"):
        engine.wait(failing)
    assert len(engine.wait(other).token_ids) == 5
