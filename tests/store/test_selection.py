"""Token selection: what is kept, what readers see of it, its records, and what is refused."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from by_hand import sealed, taken_apart
from kvgraph import Engine, SamplingParams, methods, models
from kvgraph.engine import retrieval_heads
from kvgraph.errors import KVGraphError, PlanError, StoreError
from kvgraph.graph import ContextGraph
from kvgraph.store import DiskStore, Record, format
from kvgraph.store.codecs.registry import packed, parse
from kvgraph.store.selection.base import kept_tokens, observed, selected
from kvgraph.store.selection.registry import SELECTIONS, fingerprint_selected, parse_selection
from soak import draws
from store_worker import got, key_of, same

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")
NAMES = list(SELECTIONS)
GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llama():
    return models.wrap(families.FAMILIES["llama"]())


def graph(documents=3, length=40, query=(5, 6, 7)) -> ContextGraph:
    return ContextGraph(
        [[(13 * i + 7 * j + j * j) % 120 for j in range(length)] for i in range(documents)], query=list(query)
    )


def record(tokens=20, heads=2, size=8, layers=2, seed=0, dtype=torch.float32) -> Record:
    draw = torch.Generator().manual_seed(seed)
    kv = [torch.randn(heads, tokens, size, generator=draw).to(dtype) for _ in range(2 * layers)]
    return Record(key_of(1), tuple(kv[:layers]), tuple(kv[layers:]), torch.arange(tokens))


def queries(r: Record, window: int, heads=4, seed=9) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(heads, min(window, len(r)), r.keys[0].shape[2], generator=draw) for _ in r.keys]


def chosen(name: str, r: Record, **fields) -> Record:
    selection = SELECTIONS[name](**fields)
    return selected(r, selection, queries(r, selection.window) if selection.window else ())


# -- every selection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=draws(25), deadline=None)
@given(st.integers(1, 60), st.integers(1, 100), st.integers(0, 99))
def test_what_is_kept_is_what_was_there(name, tokens, keep, seed):
    r = record(tokens, seed=seed)
    found = chosen(name, r, keep=keep)
    k = kept_tokens(SELECTIONS[name](keep=keep), tokens)
    assert 1 <= k <= tokens and k * 100 >= tokens * keep > (k - 1) * 100
    if k == tokens:
        assert found is r
        return
    assert len(found) == tokens and found.held == k and found.nbytes == r.nbytes * k // tokens
    for layer, kept in enumerate(found.kept):
        assert kept.shape == (2, k) and bool((kept.diff(dim=1) > 0).all())
        for head in range(2):
            assert torch.equal(found.keys[layer][head], r.keys[layer][head, kept[head].long()])
            assert torch.equal(found.values[layer][head], r.values[layer][head, kept[head].long()])


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_kept_is_no_selection(name, llama, tmp_path):
    """Equal fingerprints, keys, bytes and answers."""
    with Engine(llama, store=tmp_path / "a") as plain:
        expected = plain.generate(graph(), "block", GREEDY, first_logits=True)
    with Engine(llama, store=tmp_path / "b", select=f"{name}:keep=100") as engine:
        found = engine.generate(graph(), "block", GREEDY, first_logits=True)
        assert engine.fingerprint == llama.fingerprint
    assert torch.equal(found.first_logits, expected.first_logits) and found.token_ids == expected.token_ids
    files = [{f.name: f.read_bytes() for f in (tmp_path / x).rglob("*.safetensors")} for x in "ab"]
    assert files[0] == files[1] and len(files[0]) == 3


@pytest.mark.parametrize("codec", ["raw", "kivi+zstd"])
@pytest.mark.parametrize("name", NAMES)
def test_hits_and_misses_agree(name, codec, llama, tmp_path):
    """Computed in one step or many, found in memory or on disk: the same numbers."""
    spec = f"{name}:keep=40"
    found = []
    with Engine(llama, select=spec, codec=codec) as engine:
        found += [engine.generate(graph(), "block", GREEDY, first_logits=True) for _ in range(2)]
        bytes_kept = sum(
            engine.scheduler.memory.pooled(k).nbytes for k in engine.keys(engine.plan(graph(), "block"))[:-1]
        )
        assert bytes_kept == 3 * engine.scheduler.pooling.nbytes(40)
    raw = 3 * 16 * llama.kv_bytes_per_token
    assert bytes_kept == raw if codec == "raw" else bytes_kept < raw / 3, "KIVI's stay packed"
    with Engine(llama, select=spec, codec=codec, max_step_tokens=7) as engine:
        found.append(engine.generate(graph(), "block", GREEDY, first_logits=True))
    for _ in range(2):
        with Engine(llama, select=spec, codec=codec, store=tmp_path) as engine:
            found.append(engine.generate(graph(), "block", GREEDY, first_logits=True))
    assert found[-1].usage.document_tokens_computed == 0 and found[-1].usage.reused_tokens == {"disk": 120}
    for other in found[1:]:
        assert (other.first_logits - found[0].first_logits).abs().max() < 1e-4
        assert other.token_ids == found[0].token_ids


@pytest.mark.parametrize("name", NAMES)
def test_readers_attend_to_what_is_kept_and_to_nothing_else(name, llama):
    """The logits are those of an attention over the kept keys and values, computed plainly."""
    with Engine(llama, select=f"{name}:keep=30") as engine, Engine(llama) as plain:
        plan = engine.plan(graph(), "block")
        logits = engine.logits(plan)
        records = [engine.scheduler.memory.pooled(key) for key in engine.keys(plan)[:-1]]
        hidden = hiding(plain, plan, records)
        assert (logits - hidden).abs().max() < 1e-4
        assert (plain.logits(plan) - hidden).abs().max() > 1e-3, "nothing was left out"


def hiding(engine: Engine, plan, records) -> torch.Tensor:
    """Logits where a reader's scores of the tokens that aren't kept are minus infinity, in the model's own words."""
    model = engine.model
    tokens = [t for span in plan.spans for t in span.tokens]
    positions = torch.tensor([p for span in plan.spans for p in span.positions])
    starts = [0]
    for span in plan.spans:
        starts.append(starts[-1] + len(span.tokens))
    total, heads = len(tokens), model.hf.config.num_attention_heads
    shared = heads // model.layers[0].kv_heads
    visible = torch.zeros(len(model.layers), heads, total, total, dtype=torch.bool)
    for number, _ in enumerate(plan.spans):
        a, b = starts[number], starts[number + 1]
        visible[:, :, a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
    a = starts[-2]
    for number, r in enumerate(records):
        for layer in range(len(model.layers)):
            for head in range(heads):
                visible[layer, head, a:, starts[number] + r.kept[layer][head // shared].long()] = True

    def attend(layer, q, k, v, scale, softcap, sinks):
        keys, values = (t.repeat_interleave(shared, 0) for t in (k, v))
        scores = (q @ keys.transpose(1, 2)) * scale
        return scores.masked_fill(~visible[layer], -torch.inf).softmax(2) @ values

    with torch.inference_mode():
        return model.forward(torch.tensor(tokens), positions, attend, torch.tensor([total - 1]))[0]


# -- what each keeps ---------------------------------------------------------------------------------------------------


def test_key_norm_keeps_small_keys():
    r = record(10)
    r.keys[0][0, [2, 5, 7]] *= 0.01
    assert chosen("knorm", r, keep=30).kept[0][0].tolist() == [2, 5, 7]


@pytest.mark.parametrize("name", ["snapkv", "defensive", "compresskv"])
def test_the_window_and_what_it_looks_at_are_kept(name):
    r = record(30)
    asked = queries(r, 4)
    r.keys[0][0, 11] = 30 * asked[0][0, -1]  # the first head's last query looks here
    kept = selected(r, SELECTIONS[name](keep=20, window=4, kernel=1), asked).kept[0][0].tolist()
    assert set(kept) >= {11, 27, 28, 29}  # of 6: half of them can be observed


def test_the_defensive_one_keeps_what_a_single_query_needs():
    """One query needs token 3 alone; all need tokens 8 to 11 a little. The mean forgets 3, the worst case doesn't."""
    r = record(40, heads=1, layers=1)
    r.keys[0].zero_()
    asked = torch.zeros(1, 16, 8)
    asked[0, :, 0] = 1.0
    r.keys[0][0, 8:12, 0] = 4.0
    asked[0, 12, 1] = 1.0
    r.keys[0][0, 3, 1] = 5.0
    fields = {"window": 16, "kernel": 1}
    means = SELECTIONS["snapkv"](**fields).scores(r.keys[0], r.values[0], asked)[0]
    worst = SELECTIONS["defensive"](**fields).scores(r.keys[0], r.values[0], asked)[0]
    assert means[3] < means[8] and worst[3] > worst[8]


def test_only_the_voters_decide_and_all_heads_keep_their_choice():
    """Head 3 of layer 0 looks at token 5, head 0 of layer 1 at token 9. Both key/value heads of the layer keep it."""
    r = record(40)
    asked = queries(r, 4)
    r.keys[0][1, 5] = 30 * asked[0][3, -1]
    r.keys[1][0, 9] = 30 * asked[1][0, -1]
    fields = {"keep": 20, "window": 4, "kernel": 1}
    kept = selected(r, SELECTIONS["compresskv"](**fields, voters=((3,), (0,))), asked).kept
    for layer, token in enumerate((5, 9)):
        assert torch.equal(kept[layer][0], kept[layer][1]) and token in kept[layer][0].tolist()
    r.keys[0][0] *= 5  # what other heads see doesn't count
    assert torch.equal(selected(r, SELECTIONS["compresskv"](**fields, voters=((3,), (0,))), asked).kept[0], kept[0])


def test_retrieval_scores_are_attention_to_the_needle(llama):
    """Computed plainly: softmax attention of the repeated tokens, as much of it as goes to where they stood before."""
    expected = torch.zeros(len(llama.layers), 4)
    for seed, depth in enumerate(retrieval_heads.DEPTHS):
        tokens, begin = retrieval_heads.needle_text(llama.vocab_size, depth, seed)
        n = len(tokens)
        assert tokens[-24:] == tokens[begin : begin + 24] and n == 280

        def attend(layer, q, k, v, scale, softcap, sinks, n=n, begin=begin):
            keys, values = (t.repeat_interleave(2, 0) for t in (k, v))
            scores = (q @ keys.transpose(1, 2) * scale).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
            weights = scores.softmax(2)
            expected[layer] += weights[:, -24:, begin : begin + 24].sum((1, 2)) / 48
            return weights @ values

        with torch.inference_mode():
            llama.forward(torch.tensor(tokens), torch.arange(n), attend, torch.tensor([n - 1]))
    found = torch.tensor(retrieval_heads.retrieval_scores(llama))
    assert torch.allclose(found, expected, atol=1e-4) and float(expected.std()) > 0.01


def test_a_models_voters_are_found_once_and_are_in_the_key(llama):
    with Engine(llama, select="compresskv:heads=2") as one, Engine(llama, select="compresskv:heads=2") as other:
        scores = torch.tensor(retrieval_heads.retrieval_scores(llama))
        assert [set(layer) for layer in one.selection.voters] == [set(s.topk(2).indices.tolist()) for s in scores]
        assert one.fingerprint == other.fingerprint
        swapped = replace(one.selection, voters=one.selection.voters[::-1])
    assert swapped.voters != one.selection.voters
    assert fingerprint_selected("m", swapped) != fingerprint_selected("m", one.selection)
    assert SELECTIONS["compresskv"](heads=9).fitted([[0.5, 0.5, 0.1]]).voters == ((0, 1, 2),)


def test_observed_attention_is_softmax_attention():
    r = record(12)
    asked = queries(r, 5)[0]
    weights = observed(r.keys[0], asked)
    for head in range(4):
        for query in range(5):
            seen = 12 - 5 + query + 1
            expected = (r.keys[0][head // 2, :seen] @ asked[head, query]).softmax(0)
            assert (
                torch.allclose(weights[head, query, :seen], expected, atol=1e-6)
                and not weights[head, query, seen:].any()
            )


def test_the_queries_are_those_of_the_last_tokens(llama):
    """However the tokens were split over steps: their weights are the model's own attention."""
    seen = []

    @dataclass(frozen=True)
    class Spy:
        keep: int = 50
        name: ClassVar[str] = "spy"
        window: ClassVar[int] = 6

        def scores(self, keys, values, asked):
            seen.append(asked)
            return keys.norm(dim=2)

    for step in (512, 7, 3):
        with Engine(llama, select=Spy(), max_step_tokens=step) as engine:
            engine.generate(graph(1), "block", GREEDY)
    n = len(llama.layers)
    assert len(seen) == 3 * n and all(q.shape == (4, 6, 16) for q in seen)
    for layer in range(n):
        assert torch.allclose(seen[layer], seen[n + layer], atol=1e-4)
        assert torch.allclose(seen[layer], seen[2 * n + layer], atol=1e-4)


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["raw", "zstd", "fp8", "int8", "kivi", "kivi:residual=3", "gear", "gear+zstd"])
def test_records_keep_their_positions_per_layer_and_head(spec, tmp_path):
    r = chosen("snapkv", record(50), keep=40)
    r = r if spec == "raw" else packed(r, parse(spec))
    DiskStore(tmp_path).put(r)
    store = DiskStore(tmp_path)
    found = got(store, r.key)
    assert same(found, r) and all(map(torch.equal, found.kept, r.kept)) and found.held == 20
    assert store.verify().clean and [e.tokens for e in store.ls()] == [50]


def harmed(change):
    header, payload = taken_apart(b"".join(format.encode(chosen("knorm", record(10), keep=40))))
    return sealed(*change(header, bytearray(payload)))


def put(name, *numbers):
    def change(header, payload):
        begin = header[name]["data_offsets"][0]
        payload[begin : begin + 4 * len(numbers)] = torch.tensor(numbers, dtype=torch.int32).numpy().tobytes()
        return header, bytes(payload)

    return change


def line(name, **values):
    def change(header, payload):
        header[name].update(values)
        return header, bytes(payload)

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("positions.0", 3, 2),
        put("positions.1", 0, 1, 2, 10),
        put("positions.0", -1),
        put("positions.0", 2, 2),
        line("positions.0", shape=[4, 2]),
        line("positions.0", shape=[8]),
        line("positions.1", dtype="F32"),
        line("__metadata__", tokens="4"),
        line("keys.0", shape=[4, 2, 8][::-1]),
        lambda header, payload: (
            {("positions.7" if n == "positions.0" else n): v for n, v in header.items()},
            bytes(payload),
        ),
    ],
)
def test_positions_that_cannot_be_are_refused(change):
    with pytest.raises(format.BadRecord):
        format.decode(torch.frombuffer(bytearray(harmed(change)), dtype=torch.uint8), key_of(1))


def test_a_record_without_its_positions_is_not_written():
    r = chosen("knorm", record(10), keep=40)
    with pytest.raises(StoreError, match="KV of 4 tokens, but 10 positions"):
        format.encode(replace(r, kept=None))


def test_the_selection_is_in_the_key(llama):
    prints = {
        spec: fingerprint_selected("m", parse_selection(spec))
        for spec in ("knorm", "knorm:keep=25", "snapkv", "defensive")
    }
    prints["window"] = fingerprint_selected("m", parse_selection("snapkv:window=16"))
    assert len({*prints.values(), "m"}) == 6
    assert fingerprint_selected("m", parse_selection("snapkv:keep=100")) == fingerprint_selected("m", None) == "m"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("best", "no selection 'best'; there are knorm"),
        ("knorm:keep=0", "1 to 100 percent"),
        ("knorm:keep=101", "1 to 100 percent"),
        ("knorm:window=3", "no field 'window'; it has keep"),
        ("snapkv:kernel=4", "odd kernel"),
        ("compresskv:heads=0", "1 or more heads"),
        ("compresskv:voters=1", "no field 'voters'; it has keep"),
        ("snapkv:window=0", "window of 1 or more"),
        ("defensive:keep=half", "is a whole number"),
    ],
)
def test_what_is_no_selection_is_refused(text, says):
    with pytest.raises(StoreError, match=says):
        parse_selection(text)


def test_a_method_that_reads_parts_of_spans_is_refused(llama):
    with Engine(llama, select="knorm") as engine:
        plan = methods.get("epic").plan(graph())
        with pytest.raises(
            PlanError, match="selection knorm leaves out tokens of .*use another method, or no selection"
        ):
            engine.submit(plan, GREEDY)
        for method in ("full", "block", "kvlink", "graph-kv"):
            assert engine.generate(graph(), method, GREEDY).token_ids


def test_a_model_with_sliding_windows_is_refused():
    with pytest.raises(KVGraphError, match="needs a model without sliding windows"):
        Engine(models.wrap(families.FAMILIES["mistral"]()), select="knorm")
