"""Methods that recompute some tokens of documents: what EPIC and CacheBlend plan, and what CacheBlend asks the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import families
import strategies
from kvgraph import CapacityError, ContextGraph, Engine, GraphError, PlanError, SamplingParams, models
from kvgraph.engine import probe
from kvgraph.engine.probe import deviations
from kvgraph.methods import Block, CacheBlend, Epic, Full
from kvgraph.plan import Plan
from soak import some
from store_worker import got

VOCAB = 128
PREFIX, A, B, C, QUERY = [1, 2], [10, 11, 12], [20, 21], [30, 31, 32, 33], [90, 91]
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def llama():
    return models.wrap(families.FAMILIES["llama"]())


def engine_on(model: models.Model, **options) -> Engine:
    return Engine(model, kv_budget=1 << 26, **options)


def random_graph(seed: int, lengths=(12, 7, 0, 20), prefix: int = 4) -> ContextGraph:
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(VOCAB, (n,), generator=generator).tolist()

    return ContextGraph([ids(n) for n in lengths], ids(5), ids(prefix))


def places(plan: Plan) -> list[tuple]:
    """What the prompt span sees: (name, position of token 0, lo, hi)."""
    return [(plan.spans[p.span].name, p.at, p.lo, p.hi) for p in plan.prompt.sees]


def seen_by(plan: Plan, live_index: int) -> list[tuple[int, int]]:
    """(position, token) of everything a live token sees, itself included."""
    dense = plan.dense()
    row = dense.visible[len(dense.tokens) - dense.prompt + live_index]
    return sorted(zip(dense.positions[row].tolist(), dense.tokens[row].tolist(), strict=True))


def difference(engine: Engine, graph: ContextGraph, method, other) -> float:
    one, two = (engine.logits(engine.plan(graph, m)) for m in (method, other))
    return float((one - two).abs().max())


# plans, by hand


def test_epic_recomputes_the_first_tokens_of_every_document():
    plan = Epic(k=2).plan(ContextGraph([A, B, [], C], QUERY, PREFIX))
    assert plan.prompt.tokens == (10, 11, 20, 21, 30, 31, *QUERY)
    assert plan.prompt.positions == (2, 3, 5, 6, 7, 8, 11, 12)
    assert places(plan) == [("prefix", 0, 0, 2), ("doc 0", 2, 2, 3), ("doc 3", 7, 2, 4)]  # nothing is left of doc 1
    everything = list(enumerate([*PREFIX, *A, *B, *C, *QUERY]))
    for i, position in enumerate(plan.prompt.positions):  # each sees all before it, every token once
        assert seen_by(plan, i) == everything[: position + 1]


def test_epic_spares_what_opens_the_prompt():
    plan = Epic(k=2).plan(ContextGraph([[], A, C], QUERY))
    assert plan.prompt.tokens == (30, 31, *QUERY)
    assert places(plan) == [("doc 1", 0, 0, 3), ("doc 2", 3, 2, 4)]
    assert len(Epic(k=9).plan(ContextGraph([[]], QUERY)).spans) == 1


def test_epic_and_cacheblend_share_the_records_of_block():
    graph = ContextGraph([A, B, C], QUERY, PREFIX)
    alone = set(Block().plan(graph).keys("model"))
    for method in (Epic(k=1), CacheBlend(selected=((1,), (0,), (3, 1)))):
        assert set(method.plan(graph).keys("model")) == alone


def test_cacheblend_shows_the_runs_between_selected_tokens():
    plan = CacheBlend(selected=((1,), (0, 1), (3, 0))).plan(ContextGraph([A, B, C], QUERY, PREFIX))
    assert plan.prompt.tokens == (11, 20, 21, 30, 33, *QUERY)
    assert plan.prompt.positions == (3, 5, 6, 7, 10, 11, 12)
    assert places(plan) == [("prefix", 0, 0, 2), ("doc 0", 2, 0, 1), ("doc 0", 2, 2, 3), ("doc 2", 7, 1, 3)]
    everything = list(enumerate([*PREFIX, *A, *B, *C, *QUERY]))
    for i, position in enumerate(plan.prompt.positions):
        assert seen_by(plan, i) == everything[: position + 1]


def test_cacheblend_selects_the_largest_deviations_of_all_documents():
    method = CacheBlend(ratio=0.5).selecting([[0.1, 9.0, 0.2], [], [5.0, 0.3, 7.0]])
    assert method.selected == ((1,), (), (0, 2)) and method.ratio == 0.5
    assert CacheBlend(ratio=0.5).selecting([[1.0, 1.0], [1.0, 1.0]]).selected == ((0, 1), ())  # ties: the earlier
    assert CacheBlend(ratio=0.01).selecting([[1.0] * 30, [2.0] * 30]).selected == ((), (0,))
    assert CacheBlend(ratio=0.29).selecting([[1.0] * 100]).selected == (tuple(range(29)),)  # 0.29 * 100 is below 29
    assert CacheBlend().selecting([]).selected == ()


def test_cacheblend_without_a_selection_says_what_to_do():
    graph = ContextGraph([A, B], QUERY)
    with pytest.raises(
        GraphError,
        match=r"ratio=0.15 needs a model to select tokens; plan with an engine \(Engine\.plan",
    ):
        CacheBlend().plan(graph)
    with pytest.raises(GraphError, match="selects from 3 segments but the graph has 2"):
        CacheBlend(selected=((0,), (0,), (0,))).plan(graph)
    with pytest.raises(GraphError, match=r"selects tokens 0\.\.2 of doc 1, which has 2"):
        CacheBlend(selected=((), (0, 2))).plan(graph)
    with pytest.raises(GraphError, match=r"selects tokens -1\.\.0 of doc 0"):
        CacheBlend(selected=((0, -1),)).plan(graph)


# the ends of the scale, in the real engine


@pytest.mark.parametrize(
    "family", some(["llama", "mistral", "gemma2", "gemma3_text", "qwen2", "smollm3", "gpt_oss", "glm4"], 4)
)
def test_nothing_recomputed_is_block_and_everything_is_full(family):
    engine = engine_on(models.wrap(families.FAMILIES[family]()))

    @settings(max_examples=settings().max_examples // 2)
    @given(strategies.graphs(VOCAB, edges=False, max_length=12))
    def agree(graph):
        for nothing in (Epic(k=0), CacheBlend(ratio=0), CacheBlend(ratio=0.0, selected=())):
            assert difference(engine, graph, nothing, Block()) <= 1e-4
        for everything in (Epic(k=12), Epic(k=10**6), CacheBlend(ratio=1)):
            assert difference(engine, graph, everything, Full()) <= 1e-4

    agree()
    graph = random_graph(1, lengths=(6, 4, 0, 5))
    assert difference(engine, graph, Block(), Full()) > 0.1
    for between in (Epic(k=2), CacheBlend(ratio=0.4)):
        assert difference(engine, graph, between, Block()) > 1e-2 < difference(engine, graph, between, Full())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("step_tokens", [5, 512])
def test_many_runs_of_one_document_are_seen_exactly(family, step_tokens):
    """Every second token, and some: more runs than random small graphs have, beyond windows, in chunks."""
    engine = engine_on(models.wrap(families.FAMILIES[family]()), max_step_tokens=step_tokens)
    graph = random_graph(9, lengths=(41, 30))
    method = CacheBlend(selected=(range(1, 41, 2), (0, 3, 4, 9, 12, 13, 20, 22, 29)))
    plan = method.plan(graph)
    assert len(places(plan)) == 1 + 21 + 6
    dense = plan.dense()
    parts = (torch.from_numpy(part) for part in (dense.tokens, dense.positions, dense.visible))
    assert (engine.logits(plan) - engine.model.dense(*parts)[-1]).abs().max() <= 1e-4
    batch = [plan, Epic(3).plan(graph), CacheBlend(selected=(range(0, 41, 3),)).plan(graph), plan]
    requests = [engine.submit(p, GREEDY) for p in batch]
    assert [engine.wait(r).token_ids for r in requests] == [
        engine.wait(engine.submit(p, GREEDY)).token_ids for p in batch
    ]


# the probe


def deviations_from_records(engine: Engine, graph: ContextGraph) -> list[list[float]]:
    """The same from what the engine stores: a segment's record as `full` and as `block` encode it, both in its frame."""
    engine.encode([graph, graph], "full")
    engine.encode(graph, "block")
    found = []
    records = {}
    for method in (Full(), Block()):
        plan = method.plan(graph)
        for span, key in zip(plan.spans, plan.keys(engine.model.fingerprint), strict=True):
            records[method.name, span.name] = key and got(engine.scheduler.memory.pool, key)
    for name, segment in zip(graph.names, graph.segments, strict=True):
        if not segment:
            found.append([])
            continue
        one, two = records["full", name], records["block", name]
        both = zip((one.keys[1], one.values[1]), (two.keys[1], two.values[1]), strict=True)
        flat = torch.cat([(a - b).transpose(0, 1).flatten(1) for a, b in both], dim=1)
        found.append(flat.norm(dim=1).tolist())
    return found


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
@pytest.mark.parametrize("step_tokens", [7, 512])
def test_deviations_are_those_of_stored_records(family, step_tokens):
    model = models.wrap(families.FAMILIES[family]())
    graph = random_graph(2)
    found, tokens = deviations(model, graph, step_tokens)
    expected = deviations_from_records(engine_on(model), graph)
    assert [len(row) for row in found] == [12, 7, 0, 20]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
    assert min(max(row) for row in found if row) > 1e-2
    assert tokens == 4 + 2 * (12 + 7 + 20)


def test_a_document_that_opens_the_prompt_does_not_deviate(llama):
    found, _ = deviations(llama, random_graph(3, prefix=0), 512)
    assert max(found[0]) < 1e-4 < 1e-2 < max(found[1])


def test_a_model_of_one_layer_has_no_deviations():
    model = models.wrap(families.build("Llama", num_hidden_layers=1))
    assert deviations(model, random_graph(4), 512) == ([[0.0] * 12, [0.0] * 7, [], [0.0] * 20], 0)
    assert difference(engine_on(model), random_graph(4), CacheBlend(), Full()) > 0  # it still plans


def test_the_engine_probes_and_the_usage_says_so(llama):
    engine, graph = engine_on(llama), random_graph(5)
    plan = engine.plan(graph, "cacheblend")
    found, tokens = deviations(llama, graph, 512)
    assert plan.spans == CacheBlend().selecting(found).plan(graph).spans
    assert plan.probe_tokens == tokens == 82 and plan.probe_seconds > 0
    usage = engine.generate(graph, "cacheblend", GREEDY).usage
    assert usage.probe_tokens == 82 and usage.live_tokens == round(0.15 * 39) + 5
    assert usage.prompt_tokens == 4 + 39 + 5 == engine.generate(graph, "full", GREEDY).usage.prompt_tokens
    for method in (CacheBlend(0), CacheBlend(1), CacheBlend(selected=((1,),)), Epic()):
        assert engine.generate(graph, method, GREEDY).usage.probe_tokens == 0
    slow = engine.plan(random_graph(5, lengths=(900, 900)), "cacheblend")
    assert engine.wait(engine.submit(slow, GREEDY)).usage.ttft > slow.probe_seconds > 0


def test_the_selection_does_not_depend_on_what_is_stored(llama, tmp_path):
    graphs = [random_graph(i, lengths=(30, 40, 50)) for i in range(3)]
    cold = engine_on(llama, store=tmp_path)
    plans = [cold.plan(g, "cacheblend") for g in graphs]
    results = cold.generate(graphs, "cacheblend", GREEDY)  # batched
    cold.close()
    with engine_on(llama, store=tmp_path) as warm:
        assert [warm.plan(g, "cacheblend") for g in graphs] == plans
        again = [warm.generate(g, "cacheblend", GREEDY) for g in graphs]
    assert [r.token_ids for r in again] == [r.token_ids for r in results]
    assert [r.usage.document_tokens_computed for r in again] == [0, 0, 0]


def test_warming_encodes_documents_without_a_probe(llama, monkeypatch):
    engine, graph = engine_on(llama), random_graph(6)
    encoded = engine.encode(graph.with_query(""), "cacheblend")
    assert encoded.computed_tokens == 4 + 39
    assert engine.generate(graph, "cacheblend", GREEDY).usage.document_tokens_computed == 0
    assert engine.plan(graph, "cacheblend", probe=False).spans == CacheBlend(0).plan(graph).spans


def test_scoring_selects_by_documents_not_by_the_answer(llama):
    engine, graph, answer = engine_on(llama), random_graph(7), [5, 6, 7]
    whole = engine.score(graph, answer, "cacheblend").scores
    plan = engine.plan(graph, "cacheblend")
    first = torch.log_softmax(engine.logits(plan), -1)[answer[0]]
    assert float(whole[0]) == pytest.approx(float(first), abs=1e-4)


def test_what_cannot_be_planned_is_refused_before_the_model_runs(llama):
    engine = engine_on(llama)
    with pytest.raises(GraphError, match="the query is empty"):
        engine.plan(ContextGraph([A]), "cacheblend")
    with pytest.raises(GraphError, match="cacheblend ignores edges"):
        engine.plan(ContextGraph([A, B], QUERY, edges=[(0, 1)]), "cacheblend")
    with pytest.raises(PlanError, match=r"token id outside the vocabulary \(0\.\.127\)"):
        engine.plan(ContextGraph([A, [128]], QUERY), "cacheblend")
    assert len(engine.plan(ContextGraph([[]], QUERY), "cacheblend").spans) == 1


def test_what_can_never_run_is_not_probed(llama, monkeypatch):
    """A probe of a long prompt takes long; it isn't begun for one beyond the model's positions or the KV budget."""
    probed = []
    monkeypatch.setattr(probe, "deviations", lambda model, graph, _: (probed.append(graph), ([], 0))[1])
    small, large = Engine(llama, kv_budget=30 * llama.kv_bytes_per_token), engine_on(llama)
    long = random_graph(1, lengths=(llama.limit // 2, llama.limit // 2))
    with pytest.raises(PlanError, match=rf"reaches position {llama.limit + 8}, but the model's limit is {llama.limit}"):
        large.plan(long, "cacheblend")
    with pytest.raises(CapacityError, match="bytes of KV at once, but the engine's budget is"):
        small.plan(random_graph(2), "cacheblend")
    assert not probed
    fits = random_graph(2)
    large.plan(fits, "cacheblend")
    assert probed == [fits]


def test_the_probe_leaves_the_model_as_it_was(llama):
    tokens = torch.arange(20)
    before = llama.hf(tokens[None]).logits
    deviations(llama, random_graph(8), 16)
    assert torch.equal(llama.hf(tokens[None]).logits, before)
