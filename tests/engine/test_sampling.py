"""Sampling against transformers' own processors; streamed text against decoding everything at once."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvgraph.engine.detokenize import LONGEST_WAIT, TextStream
from kvgraph.engine.sampling import Sampler, SamplingError, SamplingParams, filtered
from kvgraph.errors import KVGraphError, ModelError

V = 200


def logits_of(seed: int, size: int = V) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


class TestParams:
    @pytest.mark.parametrize(
        ("field", "values"),
        {
            "max_tokens": (0, -1, 1.5, None, True),
            "temperature": (-0.1, math.nan, math.inf, "1", None),
            "top_k": (-1, 2.0, True),
            "top_p": (-0.5, 1.01, math.nan),
            "min_p": (-0.1, 1.1, math.nan),
            "seed": (1.0, "x", 2**64, -(2**63) - 1),
            "repetition_penalty": (0, -1, math.nan, math.inf),
            "stop": ("", ("a", ""), (1,), 3, b"a"),
            "stop_token_ids": ((-1,), ("1",), 1, "12", (True,)),
            "ignore_eos": (1, None),
            "logprobs": (-1, 1.0, True),
        }.items(),
    )
    def test_a_bad_value_is_one_line_that_names_the_field(self, field, values):
        for value in values:
            with pytest.raises(SamplingError, match=f"^{field} must be .+, not [^\n]+$"):
                SamplingParams(**{field: value})
        assert issubclass(SamplingError, KVGraphError)

    def test_every_field_is_checked(self):
        for field in dataclasses.fields(SamplingParams):
            with pytest.raises(SamplingError, match=f"^{field.name} "):
                SamplingParams(**{field.name: object()})

    def test_sequences_become_tuples(self):
        params = SamplingParams(stop="end", stop_token_ids=[1, 2])
        assert params.stop == ("end",) and params.stop_token_ids == (1, 2)
        assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
        assert hash(params) == hash(dataclasses.replace(params))


class TestChoice:
    def test_greedy_takes_the_best_and_of_equals_the_lowest_id(self):
        logits = logits_of(0)
        assert Sampler(SamplingParams())(logits).token == int(logits.argmax())
        for size in (5, 4097, 100_003):  # kernels differ by size
            flat = torch.zeros(size)
            flat[[3, size - 1, size // 2 + 2]] = 1.0
            assert Sampler(SamplingParams())(flat).token == 3

    @pytest.mark.parametrize(
        "fields",
        [
            {"temperature": 1.0},
            {"temperature": 0.3},
            {"temperature": 2.5},
            {"temperature": 1.0, "top_k": 7},
            {"temperature": 1.0, "top_k": 1000},
            {"temperature": 0.7, "top_p": 0.9},
            {"temperature": 1.3, "top_p": 0.05},
            {"temperature": 0.7, "min_p": 0.05},
            {"temperature": 1.4, "top_k": 30, "top_p": 0.8, "min_p": 0.1},
            {"temperature": 1.4, "repetition_penalty": 1.7},
            {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.6},
        ],
    )
    @pytest.mark.parametrize("seed", range(5))
    def test_probabilities_are_those_of_transformers(self, fields, seed):
        params = SamplingParams(**fields)
        prompt = list(range(0, V, 3))
        logits = logits_of(seed)
        ids, scores = torch.tensor([prompt]), logits[None].double()
        for used, processor in (
            (params.repetition_penalty != 1, lambda: RepetitionPenaltyLogitsProcessor(params.repetition_penalty)),
            (True, lambda: TemperatureLogitsWarper(params.temperature)),
            (params.top_k, lambda: TopKLogitsWarper(params.top_k)),
            (params.top_p < 1, lambda: TopPLogitsWarper(params.top_p)),
            (params.min_p, lambda: MinPLogitsWarper(params.min_p)),
        ):
            if used:
                scores = processor()(ids, scores)
        theirs = scores[0].softmax(-1)
        sampler = Sampler(params, prompt)
        ours = filtered(sampler._penalised(logits) if params.repetition_penalty != 1 else logits, params)
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)

    def test_the_filters_apply_in_the_stated_order(self):
        logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        # top-k keeps .4 .3 .2, renormalised .44 .33 .22: top-p 0.75 needs two. Before top-k it would need three.
        assert (filtered(logits, SamplingParams(temperature=1, top_k=3, top_p=0.75)) > 0).tolist() == [1, 1, 0, 0]
        # top-p 0.75 needs .4 .3 .2, and min-p 0.45 keeps them. After min-p they would be .44 .33 .22: two are enough.
        assert (filtered(logits, SamplingParams(temperature=1, top_p=0.75, min_p=0.45)) > 0).tolist() == [1, 1, 1, 0]
        # temperature comes before top-p
        assert (filtered(logits, SamplingParams(temperature=0.1, top_p=0.75)) > 0).tolist() == [1, 0, 0, 0]

    @pytest.mark.parametrize("size", [8, 4096])  # powers of two: their sums are exact
    def test_ties_at_the_edge_of_top_p_keep_the_lowest_ids(self, size):
        kept = filtered(torch.zeros(size), SamplingParams(temperature=1, top_p=0.5)).nonzero().flatten()
        assert kept.tolist() == list(range(size // 2))

    @pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
    def test_the_ends_of_the_draw_fall_on_tokens_that_are_kept(self, u, monkeypatch):
        monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor(u, dtype=torch.float64))
        logits = torch.tensor([-math.inf, 0.0, -math.inf])
        assert Sampler(SamplingParams(temperature=1))(logits).token == 1

    def test_extreme_values_leave_one_token(self):
        for fields in ({"temperature": 1e-300}, {"top_p": 1e-12}, {"top_p": 0}, {"min_p": 1.0}, {"top_k": 1}):
            params = SamplingParams(**{"temperature": 1.0, "seed": 1, **fields})
            assert Sampler(params)(logits_of(4) * 1e30).token == int(logits_of(4).argmax())

    def test_frequencies_follow_the_probabilities(self):
        params = SamplingParams(temperature=1.2, top_k=6, seed=0)
        logits = logits_of(1, 12)
        expected = filtered(logits, params)
        sampler, n = Sampler(params), 6000
        counts = torch.zeros(12)
        for _ in range(n):
            counts[sampler(logits).token] += 1
        kept = expected > 0
        assert counts[~kept].sum() == 0 and kept.sum() == 6
        chi2 = ((counts - n * expected)[kept] ** 2 / (n * expected[kept])).sum()
        assert chi2 < 25.7  # 5 degrees of freedom, p = 1e-4; the seed is fixed

    def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside_it(self):
        params = SamplingParams(temperature=1.5, seed=7)
        steps = [logits_of(i) for i in range(40)]
        alone = [sampler(step).token for sampler in [Sampler(params)] for step in steps]
        first, other = Sampler(params), Sampler(SamplingParams(temperature=1.0, seed=8))
        beside = []
        for step in steps:
            other(step)
            torch.rand(3)  # the global generator has no part in it
            beside.append(first(step).token)
        assert beside == alone
        assert [other(step).token for step in steps] != alone

    def test_without_a_seed_two_requests_differ_even_under_a_global_one(self):
        def tokens() -> list[int]:
            torch.manual_seed(0)
            sampler = Sampler(SamplingParams(temperature=5.0))
            return [sampler(logits_of(i)).token for i in range(40)]

        assert tokens() != tokens()

    def test_the_penalty_counts_prompt_and_answer_once_each(self):
        logits = torch.tensor([2.0, 1.9, 1.5, -1.0])
        sampler = Sampler(SamplingParams(repetition_penalty=1.2), [0, 0, 0, 99])  # 99: an id without a logit
        tokens = [sampler(logits).token for _ in range(4)]
        # 0 is 1.67 from the start; 1 is best until seen (1.58); then 0 again, since a third sight doesn't lower it more
        assert tokens == [1, 0, 0, 0]
        assert torch.allclose(sampler._penalised(logits), torch.tensor([2 / 1.2, 1.9 / 1.2, 1.5, -1.0]))
        negative = Sampler(SamplingParams(repetition_penalty=2.0), [3])
        assert negative._penalised(logits)[3] == -2.0

    def test_logprobs_are_the_models_own(self):
        logits = logits_of(3)
        raw = logits.double().log_softmax(-1)
        sampler = Sampler(
            SamplingParams(temperature=0.2, top_k=2, repetition_penalty=3.0, logprobs=4, seed=1), range(V)
        )
        choice = sampler(logits)
        assert choice.logprob == pytest.approx(float(raw[choice.token]), abs=1e-5)
        best = raw.topk(4)
        assert [t for t, _ in choice.top] == best.indices.tolist()
        assert [p for _, p in choice.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert Sampler(SamplingParams(logprobs=0))(logits).top == ()
        assert Sampler(SamplingParams())(logits).logprob is None
        assert [t for t, _ in Sampler(SamplingParams(logprobs=3))(torch.zeros(5000)).top] == [0, 1, 2]
        assert len(Sampler(SamplingParams(logprobs=50))(torch.zeros(5)).top) == 5

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_broken_logits_are_an_error_and_excluded_tokens_are_not(self, temperature):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=0, logprobs=2))
        for value, word in ((math.nan, "NaN"), (math.inf, "infinite")):
            logits = logits_of(0)
            logits[17] = value
            with pytest.raises(ModelError, match=word):
                sampler(logits)
        with pytest.raises(ModelError, match="infinite"):
            sampler(torch.full((4,), -math.inf))
        logits = torch.full((9,), -math.inf)
        logits[5] = -2.0
        assert sampler(logits).token == 5

    def test_logits_are_left_as_they_were(self):
        logits = logits_of(0)
        kept = logits.clone()
        Sampler(SamplingParams(temperature=1, top_k=3, top_p=0.5, min_p=0.5, repetition_penalty=2), range(9))(logits)
        assert torch.equal(logits, kept)


# -- text -------------------------------------------------------------------------------------------------------------

BYTES = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
TEXT = "Grüße aus 東京 👩‍👩‍👧 an 🌍!\n\n  two  spaces, ﬁn 𝔘𝔫𝔦"


def byte_level() -> Tokenizer:
    """Every byte a token, and a few merges, some of which end inside a character."""
    merges = [(a, b) for a, b in ("ðŁ", "âĢ", "Ġa", "Ġs", "th")]
    tokenizer = Tokenizer(models.BPE({**BYTES, **{a + b: 256 + i for i, (a, b) in enumerate(merges)}}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """Like sentencepiece: a space belongs to the next token, the first is stripped, unknown characters are bytes."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyzüß,!.東", "▁a", "▁th", "th", "▁s", "▁▁"]
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), *words]
    merges = [("▁", "a"), ("t", "h"), ("▁", "th"), ("▁", "s"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def oracle_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(Path(__file__).parents[1] / "data/oracle_small/models/tiny_default/tokenizer.json"))


TOKENIZERS = {"byte-level": byte_level(), "metaspace": metaspace(), "oracle": oracle_tokenizer()}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The naive reference: read on until the text ends with a stop, the longest if several."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stops if text[:end].endswith(s)]:
            return text[: end - max(map(len, found))], True
    return text, False


def streamed(tokens: list[int], decode, stops=()) -> TextStream:
    """Push all tokens, checking on the way what every piece promises."""
    stream, pieces = TextStream(decode, stops), []
    for token in tokens:
        pieces.append(stream.push(token))
        assert stream.text == "".join(pieces)
        if stream.stopped:
            assert stream.push(token) == ""
            break
    pieces.append(stream.finish())
    assert stream.finish() == ""
    assert stream.text == "".join(pieces)
    return stream


class TestTextStream:
    @every_tokenizer
    @given(
        text=st.text(alphabet="ab th,.!東üß🌍👩‍\n", max_size=60) | st.text(max_size=20),
        stops=st.lists(st.text(alphabet="ab t東🌍", min_size=1, max_size=4), max_size=3),
    )
    @example(text=TEXT, stops=[])
    @example(text=TEXT, stops=["👧 an"])
    @example(text="  a  b", stops=["b"])
    @example(text=" a東🌍", stops=["\U0001f30d"])
    def test_pieces_make_the_whole_text_up_to_the_stop(self, tokenizer, text, stops):
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        stream = streamed(tokens, tokenizer.decode, stops)
        assert (stream.text, stream.stopped) == cut(tokenizer.decode(tokens), stops)

    @given(st.lists(st.sampled_from([0x61, 0x20, 0xFF, 0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82, 0xAC, 0xC3]), max_size=80))
    def test_random_bytes_of_a_byte_level_tokenizer(self, data):
        tokenizer = TOKENIZERS["byte-level"]
        order = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = {}  # byte -> its token, read off the tokenizer's own alphabet
        for char in map(chr, range(256)):
            for byte, piece in zip(char.encode(), order.pre_tokenize_str(char)[0][0], strict=True):
                alphabet[byte] = BYTES[piece]
        printable = sorted([*range(33, 127), *range(161, 173), *range(174, 256)])
        others = [b for b in range(256) if b not in printable]
        alphabet |= {b: BYTES[chr(b)] for b in printable} | {b: BYTES[chr(256 + i)] for i, b in enumerate(others)}
        tokens = [alphabet[b] for b in data]
        assert tokenizer.decode(tokens) == bytes(data).decode(errors="replace")
        assert streamed(tokens, tokenizer.decode).text == tokenizer.decode(tokens)

    @pytest.mark.parametrize("n", range(LONGEST_WAIT - 4, LONGEST_WAIT + 5))
    def test_a_character_after_many_broken_bytes_is_whole(self, n):
        tokenizer = TOKENIZERS["byte-level"]
        tokens = [BYTES["ÿ"]] * n + [BYTES[c] for c in "ðŁĮį"]
        assert streamed(tokens, tokenizer.decode).text == tokenizer.decode(tokens) == "\ufffd" * n + "🌍"

    @every_tokenizer
    def test_no_half_character_is_shown(self, tokenizer):
        tokens = tokenizer.encode(TEXT, add_special_tokens=False).ids
        stream = TextStream(tokenizer.decode)
        pieces = [stream.push(t) for t in tokens]
        assert "\ufffd" not in "".join(pieces)
        assert sum(map(bool, pieces)) >= 20  # and yet it comes bit by bit

    def test_an_unfinished_character_is_shown_at_the_end(self):
        tokenizer = TOKENIZERS["byte-level"]
        tokens = tokenizer.encode("a🌍").ids[:-1]
        stream = TextStream(tokenizer.decode)
        assert "".join(stream.push(t) for t in tokens) == "a"
        assert stream.finish() == "\ufffd" and stream.text == "a\ufffd"

    def test_what_may_become_a_stop_is_held_back(self):
        stream = TextStream(lambda ids: "".join(map(chr, ids)), ("</s>", "<|x"))
        shown = [stream.push(ord(c)) for c in "a<b</t</s"]
        assert shown == ["a", "", "<b", "", "", "</t", "", "", ""]
        assert stream.push(ord(">")) == "" and stream.stopped
        assert stream.push(ord("y")) == "" and stream.finish() == "" and stream.text == "a<b</t"

    def test_what_did_not_become_a_stop_is_flushed(self):
        stream = TextStream(lambda ids: "".join(map(chr, ids)), ("stop",))
        assert [stream.push(ord(c)) for c in "asto"] == ["a", "", "", ""]
        assert stream.finish() == "sto" and stream.text == "asto" and not stream.stopped

    @pytest.mark.parametrize(
        ("text", "stops", "expected"),
        [
            ("stop here", ["stop"], ""),
            ("aab", ["ab"], "a"),
            ("abcd", ["abcd", "bc"], "a"),  # bc is completed first
            ("xabc", ["bc", "abc"], "x"),  # completed together: the longest
            ("aaab", ["aab"], "a"),
            ("one\n\ntwo", ["\n\n"], "one"),
        ],
    )
    def test_stops_do_not_depend_on_how_text_is_split(self, text, stops, expected):
        for split in range(2 ** (len(text) - 1)):
            parts = [""]
            for i, char in enumerate(text):
                if i and split >> (i - 1) & 1:
                    parts.append("")
                parts[-1] += char
            stream = streamed(list(range(len(parts))), lambda ids, p=parts: "".join(p[i] for i in ids), stops)
            assert stream.stopped and stream.text == expected

    @pytest.mark.parametrize("name", ["byte-level", "metaspace"])
    def test_special_tokens_without_text_do_not_eat_a_space(self, name):
        tokenizer = TOKENIZERS[name]
        eos = tokenizer.token_to_id("<eos>")
        tokens = [t for t in tokenizer.encode("a th, a s").ids for t in (t, *[eos] * 20)]
        assert streamed(tokens, tokenizer.decode).text == tokenizer.decode(tokens) == "a th, a s"

    def test_a_decoder_that_rewrites_its_text_loses_no_token(self):
        tokenizer = TOKENIZERS["metaspace"]
        euro = tokenizer.encode("€").ids[-3:]
        tokens = [*euro, euro[0], tokenizer.token_to_id("a")]
        assert tokenizer.decode(tokens) == "\ufffd" * 4 + "a"
        assert streamed(tokens, tokenizer.decode).text == "€\ufffda"

    @pytest.mark.parametrize("name", ["byte-level", "metaspace"])
    @pytest.mark.parametrize("repeated", ["a", "<eos>", "broken byte"])
    def test_the_cost_of_a_token_does_not_grow(self, name, repeated):
        tokenizer = TOKENIZERS[name]
        broken = {"byte-level": BYTES["ÿ"], "metaspace": 255}[name]
        token = broken if repeated == "broken byte" else tokenizer.token_to_id(repeated)
        decoded = 0

        def decode(ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.decode(ids)

        stream = streamed_quietly(decode, [token] * 2000)
        assert stream.text == tokenizer.decode([token] * 2000)
        assert decoded < 2000 * 120  # decoding everything each time would be 2 million

    def test_an_empty_stop_is_refused(self):
        with pytest.raises(SamplingError, match="stop"):
            TextStream(str, ("",))


def streamed_quietly(decode, tokens: list[int]) -> TextStream:
    stream = TextStream(decode)
    for token in tokens:
        stream.push(token)
    stream.finish()
    return stream


# -- penalties, biases, and answers that may not end ---------------------------------------------------------------------


def chosen(params: SamplingParams, rows: list[torch.Tensor], **more) -> list[int]:
    sampler = Sampler(params, **more)
    return [sampler(row).token for row in rows]


def test_frequency_and_presence_penalties_are_openais():
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting the answer's tokens, not the prompt's."""
    logits = torch.tensor([3.0, 2.53, 1.57, 0.0])
    rows = [logits] * 6
    for frequency, presence in ((0.7, 0.0), (0.0, 0.6), (0.5, 0.4), (-0.5, 0.0)):
        counts, want = [0, 0, 0, 0], []
        for _ in rows:
            scores = [x - n * frequency - (n > 0) * presence for x, n in zip(logits.tolist(), counts, strict=True)]
            want.append(scores.index(max(scores)))
            counts[want[-1]] += 1
        params = SamplingParams(frequency_penalty=frequency, presence_penalty=presence)
        assert chosen(params, rows, prompt_tokens=[0, 0, 1]) == want
    assert len(set(chosen(SamplingParams(frequency_penalty=0.7), rows))) > 1


def test_a_bias_is_added_before_the_repetition_penalty():
    logits = torch.tensor([1.0, 0.0, -1.0])
    assert chosen(SamplingParams(logit_bias={2: 2.5}), [logits]) == [2]
    assert chosen(SamplingParams(logit_bias={2: 2.5}, repetition_penalty=2.0), [logits], prompt_tokens=[2]) == [0]
    assert chosen(SamplingParams(logit_bias={0: -100, 99: 100}), [logits]) == [1]  # 99: no such token
    unbiased = Sampler(SamplingParams(logit_bias={2: 2.5}, logprobs=1))(logits)
    assert unbiased.logprob == pytest.approx(float(logits.log_softmax(-1)[2]))  # the model's own


def test_no_end_comes_before_min_tokens():
    logits = torch.tensor([1.0, 9.0, 8.0, 0.0])
    assert chosen(SamplingParams(min_tokens=2), [logits] * 4, ends=[1, 2, 500]) == [0, 0, 1, 1]
    assert chosen(SamplingParams(), [logits], ends=[1]) == [1]
    only = torch.tensor([-torch.inf, 1.0])
    assert chosen(SamplingParams(min_tokens=2), [only], ends=[1]) == [1]  # there is no other token


def test_no_stop_string_counts_before_min_tokens():
    stream = TextStream(lambda ids: "".join("abcX"[i] for i in ids), ["X"], min_tokens=3)
    assert [stream.push(i) for i in (0, 3, 1, 2, 3, 0)] == ["a", "X", "b", "c", "", ""]
    assert stream.stopped and stream.text == "aXbc"


def test_a_text_may_follow_another_without_a_break():
    """A decoder that drops the space before a text's first word, as SentencePiece's."""
    words = [" the", " light", " of"]
    decode = lambda ids: "".join(words[i] for i in ids).removeprefix(" ")  # noqa: E731
    assert [TextStream(decode).push(1), TextStream(decode, before=[0]).push(1)] == ["light", " light"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"frequency_penalty": 3},
        {"presence_penalty": True},
        {"logit_bias": {"a": 1}},
        {"logit_bias": [1]},
        {"logit_bias": {1: float("nan")}},
        {"min_tokens": -1},
    ],
    ids=str,
)
def test_wrong_penalties_and_biases_are_refused(wrong):
    with pytest.raises(SamplingError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    "wanted",
    [
        {"frequency_penalty": 0.1},
        {"presence_penalty": -0.1},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 1},
        {"repetition_penalty": 1.1},
        {"logprobs": 0},
        {"temperature": 0.1},
    ],
    ids=str,
)
def test_only_plain_greedy_requests_take_the_likeliest_token(wanted):
    assert SamplingParams().takes_best and not SamplingParams(**wanted).takes_best
