"""The official `openai` client against a live server: every documented feature, and the answers of `engine.generate`."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvgraph import ContextGraph, Engine, demo, methods
from kvgraph.edges import named_edges
from kvgraph.engine.result import Result
from kvgraph.server.lifecycle import event
from serving import serve, spawn

BOS, OPEN, CLOSE = "<|mem_start|>", "<|link_0|>", "<|link_1|>"
TEMPLATE = (
    f"{{{{ bos_token }}}}{{% for m in messages %}}{OPEN}{{{{ m.role }}}}\n{{{{ m.content }}}}{CLOSE}\n{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{OPEN}assistant\n{{% endif %}}"
)
DOCUMENTS = [
    {"id": "ferry", "title": "Ferry", "text": "The ferry leaves at nine."},
    {"id": "fog", "title": "Fog", "text": "In fog it leaves an hour later."},
    {"text": "Today there is fog — the third day of it."},
]
FILLED = [
    "Ferry\nThe ferry leaves at nine.\n\n",
    "Fog\nIn fog it leaves an hour later.\n\n",
    DOCUMENTS[2]["text"] + "\n\n",
]
NAMES = ["ferry", "fog", "doc 2"]
QUESTION = "When does it leave today?"
N = 12  # tokens of most answers

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


def write_chat_model(folder: Path, **config: Any) -> Path:
    """The demo's model with a BOS token, and roles in special tokens."""
    folder.mkdir()
    demo.write_model(folder)
    _change(folder / "tokenizer_config.json", bos_token=BOS, chat_template=TEMPLATE)
    begin = {"id": BOS, "ids": [demo.token_id(BOS)], "tokens": [BOS]}
    first = {"SpecialToken": {"id": BOS, "type_id": 0}}
    pair = [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": pair[:2], "pair": pair, "special_tokens": {BOS: begin}}
    _change(folder / "tokenizer.json", post_processor=processor)
    _change(folder / "config.json", bos_token_id=demo.token_id(BOS), **config)
    return folder


def write_singer(folder: Path, song: str) -> Path:
    """A model that sings a text of distinct bytes over and over: its layers add nothing, each byte makes the next."""
    folder.mkdir()
    demo.write_model(folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(weights[name])
    tokens = Engine.load(folder, check=False).tokenize(song)
    assert len(set(tokens)) == len(tokens)
    head = torch.zeros_like(weights["lm_head.weight"])
    for token, following in zip(tokens, tokens[1:] + tokens[:1], strict=True):
        head[following] = weights["model.embed_tokens.weight"][token]
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("openai") / "tiny")


@pytest.fixture(scope="module")
def url(model) -> Iterator[str]:
    with serve(model) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with client_of(url) as client:
        yield client


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    """Another engine on the same weights; it gives the answers that the server has to give."""
    return Engine.load(model, check=False)


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def ask(client: openai.OpenAI, content: str = QUESTION, **options: Any) -> Any:
    """A greedy chat completion of N tokens, unless the options say otherwise."""
    messages = [{"role": "user", "content": content}]
    defaults = {"model": "tiny", "messages": messages, "max_tokens": N, "temperature": 0}
    return client.chat.completions.create(**defaults | options)


def complete(client: openai.OpenAI, prompt: Any = QUESTION, **options: Any) -> Any:
    """A greedy completion of N tokens, unless the options say otherwise."""
    return client.completions.create(**{"model": "tiny", "prompt": prompt, "max_tokens": N, "temperature": 0} | options)


def rendered(*messages: tuple[str, str], answer: bool = True) -> str:
    """What the chat template makes of messages (role, content), written here once more."""
    text = BOS + "".join(f"{OPEN}{role}\n{content}{CLOSE}\n" for role, content in messages)
    return text + (f"{OPEN}assistant\n" if answer else "")


def expected(engine: Engine, method: Any = "full", edges: Any = (), content: str = QUESTION, **sampling: Any) -> Result:
    """The engine's own answer to a question over DOCUMENTS, laid out by hand."""
    before, after = rendered(("user", "MARK")).split("MARK")
    graph = ContextGraph(FILLED, content + after, before, edges, NAMES)
    return engine.generate(graph, method, **{"max_tokens": N} | sampling)


# -- the same answers as the engine's -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kvgraph", "edges"),
    [
        ({}, ()),
        ({"method": "full"}, ()),
        ({"method": "block"}, ()),
        ({"method": "pcw"}, ()),
        ({"method": "epic:k=4"}, ()),
        ({"method": "kvlink", "links": 0}, ()),
        ({"method": "kvlink", "links": 2, "link_start": demo.token_id("<|link_0|>"), "slots": 10}, ()),
        ({"method": "graph-kv", "edges": [[0, 2], [1, 2]]}, ((0, 2), (1, 2))),
        ({"method": "graph-kv", "edges": [["ferry", "fog"], ["fog", "doc 2"]], "rounds": 2}, ((0, 1), (1, 2))),
        ({"method": "graph-kv:band=64", "edges": "all"}, ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))),
        ({"method": "graph-kv", "edges": "chain", "layout": "tight"}, ((0, 1), (1, 2))),
        ({"method": "graph-kv-rag", "edges": "top-k:2+self"}, named_edges("top-k:2+self", NAMES)),
        ({"method": "graph-kv", "edges": [[0, 1], [1, 2], [2, 0]], "rounds": 3}, ((0, 1), (1, 2), (2, 0))),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_an_answer_over_documents_is_the_engines(client, engine, kvgraph, edges):
    body = {"documents": DOCUMENTS, "kvgraph": kvgraph}
    answer = ask(client, extra_body=body)
    fields = {k: v for k, v in kvgraph.items() if k not in ("method", "edges")}
    spec = kvgraph.get("method", "full")
    method = methods.parse(spec + ("," if ":" in spec else ":") + ",".join(f"{k}={v}" for k, v in fields.items()))
    want = expected(engine, method, edges)
    assert answer.choices[0].message.content == want.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == {"length": "length", "stop": "stop"}[want.finish_reason]
    assert answer.usage.prompt_tokens == want.usage.prompt_tokens
    assert answer.usage.completion_tokens == want.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.kvgraph["method"] == method.name
    again = ask(client, extra_body=body)
    assert again.choices == answer.choices
    assert again.usage.kvgraph["document_tokens_computed"] == 0
    assert again.usage.prompt_tokens_details.cached_tokens > 0


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.7, "seed": -(1 << 63), "top_p": 0.9},
        {"temperature": 2.0, "seed": 3, "top_k": 20, "min_p": 0.01},
        {"temperature": 1.0, "seed": (1 << 63) - 4, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_seeded_sampling_is_the_engines_and_choice_i_has_seed_plus_i(client, engine, sampling):
    known = {k: v for k, v in sampling.items() if k in ("temperature", "seed", "top_p")}
    extra = {k: v for k, v in sampling.items() if k not in known}
    answer = ask(client, n=3, **known, extra_body={"documents": DOCUMENTS, "kvgraph": {"method": "block"}, **extra})
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert texts == [expected(engine, "block", **sampling | {"seed": sampling["seed"] + i}).text for i in range(3)]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == sum(
        expected(engine, "block", **sampling | {"seed": sampling["seed"] + i}).usage.completion_tokens for i in range(3)
    )


def test_a_chat_without_documents_is_one_plain_prompt(client, engine):
    messages = [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "Who are you?")]
    answer = ask(client, messages=[{"role": r, "content": c} for r, c in messages])
    prompt = rendered(*messages)
    want = engine.generate(ContextGraph([], prompt), max_tokens=N)
    assert answer.choices[0].message.content == want.text
    assert answer.usage.prompt_tokens == len(engine.tokenize(prompt))  # one BOS: the template's
    assert prompt.count(BOS) == 1


def test_content_may_come_in_parts_and_names_are_taken(client):
    parts = [{"type": "text", "text": "When does it "}, {"type": "text", "text": "leave today?"}]
    messages = [{"role": "user", "content": parts, "name": "ann"}]
    assert ask(client, messages=messages).choices[0].message.content == ask(client).choices[0].message.content


def test_completions_take_texts_and_token_ids_one_or_many(client, engine):
    texts = ["one two", "three", BOS + "three"]
    tokens = [engine.tokenize(BOS + text.removeprefix(BOS)) for text in texts]
    want = [engine.generate(ContextGraph([], ids), max_tokens=N).text for ids in tokens]
    assert want[1] == want[2]
    assert [complete(client, text).choices[0].text for text in texts] == want  # BOS is added where it is missing, once
    assert [complete(client, ids).choices[0].text for ids in tokens] == want
    for prompts in (texts, tokens):
        answer = complete(client, prompts, n=2)
        assert [(c.index, c.text) for c in answer.choices] == list(enumerate(t for t in want for _ in range(2)))
        assert answer.usage.prompt_tokens == sum(map(len, tokens))  # each prompt counts once
    answer = complete(client, engine.tokenize("three"))  # token ids are taken as they are
    assert answer.choices[0].text == engine.generate(ContextGraph([], engine.tokenize("three")), max_tokens=N).text


def test_completions_over_documents(client, engine):
    options = {"method": "graph-kv", "edges": [["ferry", "doc 2"]], "prefix": "Read this.\n"}
    answer = complete(client, extra_body={"documents": DOCUMENTS, "kvgraph": options})
    graph = ContextGraph(FILLED, QUESTION, BOS + "Read this.\n", [(0, 2)])
    want = engine.generate(graph, "graph-kv", max_tokens=N)
    assert answer.choices[0].text == want.text
    assert answer.usage.prompt_tokens == want.usage.prompt_tokens


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_answers_are_as_long_as_asked(client, engine, field):
    answer = ask(client, **{"max_tokens": openai.omit, field: 3}, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_stop_strings_and_stop_tokens_end_an_answer(client, engine):
    full = ask(client).choices[0].message.content
    stop = full[4:6]
    answer = ask(client, stop=["nowhere in it", stop])
    assert answer.choices[0].message.content == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert ask(client, stop=stop).choices[0].message.content == full[: full.index(stop)]
    ids = engine.generate(ContextGraph([], rendered(("user", QUESTION))), max_tokens=N).token_ids
    answer = ask(client, extra_body={"stop_token_ids": ids[3:4]})
    assert answer.usage.completion_tokens == ids.index(ids[3]) + 1
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_engines(client, engine):
    graph = ContextGraph([], rendered(("user", QUESTION)))
    want = engine.generate(graph, max_tokens=N, logprobs=3).sampled
    answer = ask(client, logprobs=True, top_logprobs=3).choices[0]
    entries = answer.logprobs.content
    assert [e.logprob for e in entries] == pytest.approx([s.logprob for s in want], abs=1e-4)
    for entry, sampled in zip(entries, want, strict=True):
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([p for _, p in sampled.top], abs=1e-4)
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert bytes(entry.bytes).decode(errors="replace") == engine.model.tokenizer.decode([sampled.token])
    assert ask(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(client).choices[0].logprobs is None

    text = complete(client, [engine.tokenize(rendered(("user", QUESTION)))], logprobs=2).choices[0]
    assert text.logprobs.tokens == [e.token for e in entries]
    assert text.logprobs.token_logprobs == pytest.approx([s.logprob for s in want], abs=1e-4)
    for token, at in zip(text.logprobs.tokens, text.logprobs.text_offset, strict=True):
        assert token.startswith(("bytes:", "<|")) or text.text[at:].startswith(token)
    assert all(len(top) <= 2 and math.isfinite(sum(top.values())) for top in text.logprobs.top_logprobs)


# -- streams ------------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_answer_piece_by_piece(client):
    body = {"documents": DOCUMENTS, "kvgraph": {"method": "block"}}
    whole = ask(client, extra_body=body, n=2, seed=5, temperature=1, logprobs=True, top_logprobs=1)
    chunks = list(
        ask(
            client, extra_body=body, n=2, seed=5, temperature=1, logprobs=True, top_logprobs=1,
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *rest, last = chunks
    assert last.choices == [] and all(chunk.usage is None for chunk in rest)
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert {(c.id, c.created, c.model, c.object) for c in chunks} == {
        (chunks[0].id, chunks[0].created, "tiny", "chat.completion.chunk")
    }
    for i, choice in enumerate(whole.choices):
        mine = [c.choices[0] for c in rest if c.choices[0].index == i]
        assert mine[0].delta.role == "assistant" and all(m.delta.role is None for m in mine[1:])
        assert "".join(m.delta.content or "" for m in mine) == choice.message.content
        assert [m.finish_reason for m in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        tokens = [e.token for m in mine if m.logprobs for e in m.logprobs.content]
        assert tokens == [e.token for e in choice.logprobs.content]


def test_a_stream_without_usage_has_none(client):
    assert all(chunk.choices and chunk.usage is None for chunk in ask(client, stream=True))


def test_completions_stream_too(client):
    whole = complete(client, ["one", "two"], logprobs=1)
    chunks = list(complete(client, ["one", "two"], logprobs=1, stream=True, stream_options={"include_usage": True}))
    assert chunks.pop().usage.total_tokens == whole.usage.total_tokens
    for i, choice in enumerate(whole.choices):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == i]
        assert "".join(m.text for m in mine) == choice.text
        assert [o for m in mine if m.logprobs for o in m.logprobs.text_offset] == choice.logprobs.text_offset


def test_characters_of_several_tokens_come_whole(tmp_path):
    song = "🙂é日ж a"
    with serve(write_singer(tmp_path / "tiny", song)) as url, client_of(url) as client:
        for prompt, n in (("a", 14), ("a", 12), ("a", 2)):
            whole = complete(client, prompt, max_tokens=n).choices[0].text
            pieces = [chunk.choices[0].text for chunk in complete(client, prompt, max_tokens=n, stream=True)]
            assert "".join(pieces) == whole == (song.encode() * 2)[:n].decode(errors="replace")
            assert "\ufffd" not in "".join(pieces[:-1])  # what never became a character comes at the end
        pieces = [chunk.choices[0].text for chunk in complete(client, "a", max_tokens=60, stop="日", stream=True)]
        assert "".join(pieces) == "🙂é"
        chat = ask(client, "a 🙂", stream=True)
        assert "\ufffd" not in "".join(chunk.choices[0].delta.content or "" for chunk in chat)


def test_the_async_client(url, engine):
    """Requests with other documents each, at once, streamed or not: everybody gets their own answer."""
    texts = [[f"Room {i} is {colour}." for colour in ("red", "green")] for i in range(12)]

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        body = {"documents": [{"text": t} for t in texts[i]], "kvgraph": {"method": ("block", "full")[i % 2]}}
        options = dict(model="tiny", prompt=f"Room {i}?", max_tokens=N, temperature=0, extra_body=body)
        if i % 3:
            return (await client.completions.create(**options)).choices[0].text
        stream = await client.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(one(client, i) for i in range(len(texts))))

    want = [
        engine.generate(
            ContextGraph([f"{t}\n\n" for t in texts[i]], f"Room {i}?", BOS), ("block", "full")[i % 2], max_tokens=N
        ).text
        for i in range(len(texts))
    ]
    assert asyncio.run(everybody()) == want
    assert len(set(want)) == len(want)


# -- conversations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_documents", [False, True])
def test_later_turns_reuse_the_earlier_ones(url, engine, with_documents):
    """Turn k+1 finds all messages that turn k rendered; nothing is tokenized in another way than before."""
    client = client_of(url)
    messages = [("system", f"Be brief and kind, {with_documents}.")]
    body: dict[str, Any] = {"kvgraph": {"method": "full"}}
    if with_documents:
        body |= {"documents": DOCUMENTS, "kvgraph": {"method": "block"}}
    known = 0
    for question in ("Who are you?", "Since when?", "And 🙂 after?"):
        messages.append(("user", question))
        answer = ask(client, messages=[{"role": r, "content": c} for r, c in messages], extra_body=body)
        before = rendered(*messages[:-1], answer=False)
        details = answer.usage.prompt_tokens_details
        if with_documents:
            documents = sum(len(engine.tokenize(text)) for text in FILLED)
            start, after = rendered(*messages[:-1], ("user", "MARK")).split("MARK")
            want = engine.generate(ContextGraph(FILLED, question + after, start), "block", max_tokens=N)
            assert details.cached_tokens >= (known + documents if known else 0)
            known = len(engine.tokenize(before))
        else:
            prompt = rendered(*messages)
            want = engine.generate(ContextGraph([], prompt), max_tokens=N)
            assert details.cached_tokens == known
            known = len(engine.tokenize(rendered(*messages, answer=False)))
            assert answer.usage.prompt_tokens == len(engine.tokenize(prompt))
        content = answer.choices[0].message.content
        assert content == want.text
        messages.append(("assistant", content))


# -- models, and what is refused ----------------------------------------------------------------------------------------


def test_models(client):
    card = client.models.list().data[0]
    assert (card.id, card.object, card.owned_by) == ("tiny", "model", "kvgraph")
    assert client.models.retrieve("tiny") == card
    assert card.kvgraph["default_method"] == "full" and "graph-kv" in card.kvgraph["methods"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "at most 16"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1 << 20}, None, "the model's limit is 32768"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, ""),
        ({"logit_bias": {"1": 200}}, "logit_bias.1", "less than or equal to 100"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "has no place for tools"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"extra_body": {"kvgraph": {"method": "magic"}}}, None, "there is no method 'magic'"),
        ({"extra_body": {"kvgraph": {"depth": 2}}}, None, "neither an option nor a field of full"),
        ({"extra_body": {"kvgraph": {"prefix": "x"}}}, "kvgraph.prefix", "send a system message"),
        ({"extra_body": {"kvgraph": {"edges": [[0, 1]]}}}, None, "there is no segment 0"),
        ({"extra_body": {"documents": DOCUMENTS, "kvgraph": {"edges": [[0, 1]]}}}, None, "edges"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_a_bad_request(client, options, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    body = caught.value.body
    assert body["type"] == "invalid_request_error"
    assert message in body["message"] and "\n" not in body["message"]
    assert param is None or body["param"] == param


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_neutral_values_of_unsupported_fields_are_taken(client):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "user": "ann", "metadata": {"a": "b"}}
    assert ask(client, **neutral).choices[0].message.content == ask(client).choices[0].message.content


def test_a_deadline_ends_an_answer_whether_streamed_or_not(client):
    options = {"max_tokens": 10_000, "extra_body": {"ignore_eos": True, "kvgraph": {"timeout": 0.3}}}
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, **options)
    assert caught.value.status_code == 504
    got = []
    with pytest.raises(openai.APIError, match="deadline"):
        for chunk in ask(client, stream=True, **options):
            got.append(chunk)
    assert got and all(chunk.choices[0].finish_reason is None for chunk in got)


def test_keys_and_limits_are_the_error_classes_of_the_client(model):
    keys = [
        {"key": "key-of-ann", "tenant": "ann", "requests_per_minute": 2},
        {"key": "key-of-bob", "tenant": "bob", "concurrent": 1},
    ]
    with serve(model, api_keys=keys, max_request_bytes=10_000) as url:
        with client_of(url, "wrong-key") as client, pytest.raises(openai.AuthenticationError):
            ask(client)
        with client_of(url, "key-of-ann") as client:
            assert [ask(client).usage.completion_tokens > 0 for _ in range(2)] == [True, True]
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client)
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
        with client_of(url, "key-of-bob") as client:
            with ask(client, stream=True, max_tokens=5000, extra_body={"ignore_eos": True}) as stream:
                next(iter(stream))
                with pytest.raises(openai.RateLimitError, match="at once"):
                    ask(client)
            with pytest.raises(openai.APIStatusError) as caught:
                ask(client, "x" * 20_000)
            assert caught.value.status_code == 413


def test_documents_that_do_not_fit_are_refused_or_dropped(tmp_path):
    model = write_chat_model(tmp_path / "tiny", max_position_embeddings=512)
    texts = [f"{i} " + "word " * 12 for i in range(5)]  # 64 tokens each, and twice as many positions
    pairs = [(f"d{s}", f"d{r}") for r in range(5) for s in range(5)]
    options = {"method": "graph-kv-rag", "edges": pairs}
    body = {"documents": [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)], "kvgraph": options}
    with serve(model) as url, client_of(url) as client:
        with pytest.raises(openai.BadRequestError, match="limit is 512") as caught:
            ask(client, extra_body=body)
        assert caught.value.code == "context_length_exceeded"
    before, after = rendered(("user", "MARK")).split("MARK")
    kept = ContextGraph([f"{text}\n\n" for text in texts[:3]], QUESTION + after, before, named_edges("all+self", NAMES))
    want = Engine.load(model, check=False).generate(kept, "graph-kv-rag", max_tokens=N).text
    with serve(model, overflow="drop") as url, client_of(url) as client:
        for edges in (pairs, ",".join(f"{s}>{r}" for s, r in pairs), "all+self"):
            answer = ask(client, extra_body=body | {"kvgraph": options | {"edges": edges}})
            assert answer.usage.kvgraph["dropped"] == ["d3", "d4"]
            assert answer.choices[0].message.content == want
        answer = ask(client, extra_body=body | {"kvgraph": options | {"edges": "star:4"}})
        assert answer.usage.kvgraph["dropped"] == ["d4"]  # the star's center, so that no edge is left
        with pytest.raises(openai.BadRequestError, match="limit is 512"):
            ask(client, "too long " * 100, extra_body=body)


# -- restarts -----------------------------------------------------------------------------------------------------------


def test_a_restart_on_the_same_store_computes_no_document_token(model, tmp_path):
    body = {"documents": DOCUMENTS, "kvgraph": {"method": "graph-kv", "edges": "chain"}}
    answers = []
    for _ in range(2):
        with spawn("--model", model, "--store", tmp_path / "kv") as (process, url), client_of(url) as client:
            answers.append(ask(client, extra_body=body))
            process.terminate()
            assert process.wait(30) == 0
    first, second = answers
    assert first.usage.kvgraph["document_tokens_computed"] > 0
    assert second.usage.kvgraph["document_tokens_computed"] == 0
    assert set(second.usage.kvgraph["reused_tokens"]) == {"disk"}
    assert second.choices == first.choices


def test_an_event_is_one_line_whatever_its_text():
    """httpx.iter_lines and str.splitlines cut at more than line feeds, and a model may write any of these."""
    text = "".join(map(chr, range(0x3000)))
    told = event({"text": text, "\u2028": "é"})
    assert len(told.splitlines()) == 2 and json.loads(told.removeprefix("data: ")) == {"text": text, "\u2028": "é"}
    assert "é" in told
