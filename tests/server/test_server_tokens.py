"""Single tokens over HTTP: their bytes, names and offsets, and the tokenizer's own routes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from kvgraph import Engine, demo
from kvgraph.engine.sampling import Sampled
from kvgraph.graph import ContextGraph
from kvgraph.server.tokens import Offsets, TokenNames
from serving import Live, error, events

BOS = "<|mem_start|>"
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
WORDS = "true false ship night cape the a of and in light house red blue one two".split()


def sentencepiece() -> Tokenizer:
    """A tokenizer as SentencePiece's: spaces as "▁", bytes as "<0xEF>", no space before a text's first word."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += [form for word in WORDS for form in ("▁" + word, word)]
    vocabulary += [char for char in "▁abcdefghijklmnopqrstuvwxyz.,?!\n" if char not in vocabulary]
    vocabulary += [f"▁w{i}" for i in range(420 - len(vocabulary))]
    made = Tokenizer(
        kinds.BPE(
            {piece: i for i, piece in enumerate(vocabulary)}, [],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=True,
        )
    )  # fmt: skip
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def folder(request, tmp_path_factory) -> Path:
    """The tiny model, with its byte-level tokenizer or with another of at most as many tokens."""
    made = tmp_path_factory.mktemp("tokens") / "tiny"
    made.mkdir()
    if request.param == "bytes":
        demo.write_model(made)
        config = json.loads((made / "tokenizer_config.json").read_text()) | {"chat_template": CHAT}
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = sentencepiece()
        shape = LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(shape).save_pretrained(made)
        tokenizer.save(str(made / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        config |= {"unk_token": "<unk>", "chat_template": CHAT}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return Engine(model, kv_budget=1 << 28)


def complete(server: Live, **more: Any) -> dict[str, Any]:
    """The one choice of a completion."""
    body = {"prompt": "the light", "max_tokens": 40, "temperature": 1, "seed": 5, "logprobs": 5, **more}
    answer = server.ask(**body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def stands_there(choice: dict[str, Any]) -> None:
    """Assert that each token that is whole text stands at its offset."""
    logprobs, text = choice["logprobs"], choice["text"]
    for token, at in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<")) and text[at : at + 1] != "\ufffd":  # bytes that are no text
            assert text[at : at + len(token)] == token, (token, at, text)


def test_tokens_have_their_real_bytes(server):
    body = {"model": server.name, "messages": [{"role": "user", "content": "🦜"}], "max_tokens": 40, "seed": 5}
    body |= {"logprobs": True, "top_logprobs": 5, "ignore_eos": True, "logit_bias": {"0": -100, "1": -100, "2": -100}}
    choice = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    if server.server.tokens.is_byte(50):  # SentencePiece: a run of bytes that is no text is U+FFFD for each of them
        pieces = server.server.tokenizer.get_vocab()
        assert all(bytes(e["bytes"]) == e["token"].encode() for e in entries if e["token"].replace(" ", "▁") in pieces)
    else:
        data = b"".join(bytes(entry["bytes"]) for entry in entries if entry["token"][:2] != "<|")  # no special ones
        assert data.decode("utf-8", "replace") == choice["message"]["content"]
    assert any(entry["token"].startswith("bytes:\\x") for entry in entries)  # half characters are among them
    for entry in entries:
        assert entry["token"].startswith("bytes:") or bytes(entry["bytes"]).decode() == entry["token"]
        assert len({top["token"] for top in entry["top_logprobs"]}) == 5


def test_offsets_match_the_text_and_entries_are_distinct(server):
    choice = complete(server)
    stands_there(choice)
    logprobs = choice["logprobs"]
    for i, (token, top) in enumerate(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)):
        assert top[token] == logprobs["token_logprobs"][i] and len(top) == 5 + (token not in list(top)[:5])
    streamed = events(
        server.ask(prompt="the light", max_tokens=40, temperature=1, seed=5, logprobs=5, stream=True).text
    )
    parts = [chunk["choices"][0] for chunk in streamed[:-1]]
    assert "".join(part["text"] for part in parts) == choice["text"]
    for name in ("tokens", "text_offset", "top_logprobs"):
        assert [x for p in parts if p["logprobs"] for x in p["logprobs"][name]] == choice["logprobs"][name]


def test_two_tokens_of_one_name_stay_two():
    tokens = TokenNames(PreTrainedTokenizerFast(tokenizer_object=sentencepiece()))
    vocabulary = sentencepiece().get_vocab()
    same = [vocabulary["a"], vocabulary["<0x61>"], vocabulary["▁a"]]
    likeliest = [(token, -1.0) for token in same]
    assert list(tokens.names(Sampled(same[0], -1.0, likeliest)).items()) == list(
        zip(same, ["a", "<0x61>", " a"], strict=True)
    )
    chosen = tokens.names(Sampled(same[1], -1.0, likeliest))  # has its usual name
    assert chosen == {same[1]: "a", same[0]: f"token_id:{same[0]}", same[2]: " a"}
    assert [tokens.bytes(t) for t in same] == [b"a", b"a", b" a"] and tokens.bytes(10**6) == b""
    assert tokens.name(vocabulary["<0xF0>"]) == "bytes:\\xf0"


def test_offsets_count_characters():
    tokens = TokenNames(PreTrainedTokenizerFast(tokenizer_object=sentencepiece(), eos_token="</s>"))
    vocabulary, offsets = sentencepiece().get_vocab(), Offsets(tokens)
    pieces = ["▁a", "<0xF0>", "<0x9F>", "<0xA6>", "<0x9C>", "</s>", "a"]
    assert [offsets(vocabulary[piece]) for piece in pieces] == [0, 2, 2, 2, 2, 3, 3]
    runs = ["▁a", "<0x6C>", "<0x6C>", "a", "<0xF0>", "<0x6C>", "a"]  # of bytes that are no text, each is U+FFFD
    offsets = Offsets(tokens)
    assert [offsets(vocabulary[piece]) for piece in runs] == [0, 2, 3, 4, 5, 6, 7]
    broken = ["▁a", "<0xB3>", "<0x3A>", "<0x3A>", "▁a", "<0xC3>", "<0xA9>", "<0xB3>", "a"]
    ids, offsets = [vocabulary[piece] for piece in broken], Offsets(tokens)
    assert tokens._tokenizer.decode(ids) == "a\ufffd\ufffd\ufffd a\ufffd\ufffd\ufffda"  # without the first space
    assert [offsets(token) for token in ids] == [0, 2, 3, 4, 5, 7, 7, 9, 10]


def test_offsets_count_characters_that_break_off(tmp_path):
    demo.write_model(tmp_path)
    tokens = TokenNames(PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")))
    data = b"a\xf0\x9fb\xe1$\xef\xbf\xbdc\xffd"
    ids = [next(t for t in range(256) if tokens.bytes(t) == bytes([byte])) for byte in data]
    offsets = Offsets(tokens)
    found = [offsets(token) for token in ids]
    text = data.decode(errors="replace")
    assert text == "a\ufffdb\ufffd$\ufffdc\ufffdd" and [text[at] for at in found][-1] == "d"
    assert found == [0, 1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8]


# -- prompts in answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["the light", " of", "night 🦜 one"])
def test_an_echo_is_the_prompt_and_its_log_probabilities(server, engine, prompt):
    choice = complete(server, prompt=prompt, echo=True, max_tokens=3)
    plain = complete(server, prompt=prompt, max_tokens=3)
    assert choice["text"] == prompt + plain["text"]
    logprobs, ids = choice["logprobs"], engine.tokenize(prompt)
    scores = engine.score(ContextGraph([], ids[:1]), ids[1:]).scores
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(scores.tolist(), abs=1e-4)
    assert logprobs["token_logprobs"][len(ids) :] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-4)
    assert logprobs["tokens"][len(ids) :] == plain["logprobs"]["tokens"]
    assert all(5 <= len(top) <= 6 for top in logprobs["top_logprobs"][1:])
    if not logprobs["tokens"][0].startswith(" ") or prompt.startswith(" "):  # else its space isn't in the text
        stands_there(choice)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    *chunks, _ = events(
        server.ask(prompt=prompt, max_tokens=3, temperature=1, seed=5, logprobs=5, echo=True, stream=True).text
    )
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert [o for p in parts if p["logprobs"] for o in p["logprobs"]["text_offset"]] == logprobs["text_offset"]


def test_an_echo_may_be_all(server, engine):
    """As lm-eval asks, with token ids; several prompts, each with its own."""
    prompts = [engine.tokenize(text) for text in ("the light", "one two", "a")]
    answer = server.ask(prompt=prompts, echo=True, max_tokens=0, logprobs=1).json()
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        assert choice["text"] == engine.detokenize(prompt) and choice["finish_reason"] == "length"
        scores = engine.score(ContextGraph([], prompt[:1]), prompt[1:]) if prompt[1:] else None
        want = [] if scores is None else scores.scores.tolist()
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(want, abs=1e-4)
    assert answer["usage"]["completion_tokens"] == 0
    assert error(server.ask(prompt="a", max_tokens=0), 400)["message"].startswith("max_tokens must be at least 1")
    refused = error(server.ask(prompt="a", echo=True, documents=[{"text": "x"}]), 400)
    assert refused["param"] == "echo"


def test_a_long_echo_is_scored_in_several_steps(server, engine):
    prompt = engine.tokenize("the light of one ship and two " * 40)
    engine.scheduler.max_step_tokens = 64
    choice = complete(server, prompt=prompt, echo=True, max_tokens=1)
    scores = engine.score(ContextGraph([], prompt[:1]), prompt[1:]).scores
    assert choice["logprobs"]["token_logprobs"][1:-1] == pytest.approx(scores.tolist(), abs=1e-3)
    assert math.isfinite(choice["logprobs"]["token_logprobs"][-1])


# -- the tokenizer's routes -------------------------------------------------------------------------------------------


def post(server: Live, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/{path}", json=body)


def test_texts_are_tokenized_and_written_out(server, engine):
    ids = engine.tokenize("the light")
    told = post(server, "tokenize", model=server.name, prompt="the light", return_token_strs=True).json()
    assert told["tokens"] == ids and told["count"] == len(ids) and told["max_model_len"] == engine.model.limit
    assert told["token_strs"] == engine.model.tokenizer.convert_ids_to_tokens(ids)
    assert post(server, "tokenize", prompt="the light", add_special_tokens=False).json()["token_strs"] is None
    assert post(server, "detokenize", tokens=ids).json() == {"prompt": "the light"}
    assert error(post(server, "detokenize", tokens=[10**6]), 400)["param"] == "tokens"
    assert error(post(server, "tokenize", model="other", prompt="x"), 404)["code"] == "model_not_found"
    for wrong in ({}, {"prompt": "x", "messages": [{"role": "user"}]}):
        assert "give prompt, or messages" in error(post(server, "tokenize", **wrong), 400)["message"]


def test_a_chat_is_tokenized_as_it_is_answered(server, engine):
    messages = [{"role": "user", "content": "the light"}, {"role": "assistant", "content": "of a ship"}]
    told = post(server, "tokenize", messages=messages).json()
    body = {"model": server.name, "messages": messages, "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    assert told["count"] == answer["usage"]["prompt_tokens"] == len(told["tokens"])
    open_ = post(server, "tokenize", messages=messages, add_generation_prompt=False, continue_final_message=True).json()
    assert engine.detokenize(open_["tokens"]).endswith("of a ship") and open_["count"] < told["count"]


def test_the_tokenizer_tells_of_itself(server, engine):
    told = httpx.get(f"{server.url}/tokenizer_info").json()
    tokenizer = engine.model.tokenizer
    assert told["chat_template"] == CHAT and told["eos_token"] == tokenizer.eos_token
    assert told["tokenizer_class"] == type(tokenizer).__name__
    assert str(engine.model.name) not in json.dumps({k: v for k, v in told.items() if k != "chat_template"})
