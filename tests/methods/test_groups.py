"""Groups of places: any plan that has them runs as the dense reference says, and what methods do with them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import families
import strategies
from dense import dense_greedy, dense_logits, random_graph
from kvgraph import ContextGraph, Engine, SamplingParams, models
from kvgraph.methods import APE, PCW, GraphKV
from kvgraph.models.adapter import grouped_attention
from kvgraph.plan import Group, Place, Plan, contiguous
from soak import draws, some

VOCAB = 128
BUDGET = 1 << 26

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def llama():
    return models.wrap(families.FAMILIES["llama"]())


# gemma2: softcap, windows; gpt_oss: sinks, windows; cohere2: layers without rotation; glm4: partial, interleaved
@pytest.mark.parametrize("family", some(["llama", "gemma2", "gpt_oss", "cohere2", "glm4"], 3))
def test_two_executors_agree_on_any_plan(family):
    model = models.wrap(families.FAMILIES[family]())
    engine = Engine(model, kv_budget=BUDGET)

    @settings(max_examples=draws(20))
    @given(strategies.plans(VOCAB))
    def agree(plan):
        assume(any(span.groups for span in plan.spans))
        expected = dense_logits(model, plan)
        for _ in range(2):  # the second time from stored KV
            assert (engine.logits(plan) - expected).abs().max() <= 1e-4

    agree()


@settings(max_examples=draws(15))
@given(st.lists(strategies.plans(VOCAB), min_size=1, max_size=5), st.integers(1, 40))
def test_batching_and_chunking_never_change_a_result(llama, plans, step_tokens):
    engine = Engine(llama, kv_budget=BUDGET, max_step_tokens=step_tokens)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    requests = [engine.submit(plan, params, first_logits=True) for plan in plans]
    for plan, result in zip(plans, [engine.wait(r) for r in requests], strict=True):
        assert (result.first_logits - dense_logits(llama, plan)).abs().max() <= 1e-4
        assert result.token_ids == dense_greedy(llama, plan, 3)


def test_dense_by_the_definition():
    """One layer's attention, computed with scalars: two keys in a group, one outside, and the token itself."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 2), torch.randn(1, 4, 2), torch.randn(1, 4, 2)
    seen, together = torch.ones(4, 4, dtype=torch.bool).tril(), torch.zeros(4, 4, dtype=torch.bool)
    together[3, :2] = True
    temperature, scale = 0.5, 0.7
    out = grouped_attention(q[None], k[None], v[None], seen, [(together, (temperature, scale))], scaling=2.0)
    score = [2.0 * float(q[0, 3] @ key) for key in k[0]]
    inside = [math.exp(s / temperature) for s in score[:2]]
    context = sum(w * v[0, i] for i, w in enumerate(inside)) / sum(inside)
    weights = [math.exp(scale * math.log(sum(inside))), math.exp(score[2]), math.exp(score[3])]
    expected = (weights[0] * context + weights[1] * v[0, 2] + weights[2] * v[0, 3]) / sum(weights)
    assert torch.allclose(out[0, 3, 0], expected, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_neutral_group_changes_nothing(family):
    """The spelled-out reference against transformers' own eager attention, on each kind of layer."""
    model = models.wrap(families.FAMILIES[family]())
    graph = random_graph(1)
    plain, neutral = (dense_logits(model, m.plan(graph)) for m in (PCW(shared_prefix=True), APE(1, 1)))
    assert (plain - neutral).abs().max() <= 1e-4
    assert (plain - dense_logits(model, APE(0.5, 0.8).plan(graph))).abs().max() > 1e-2


def test_every_step_of_decoding_uses_the_group(llama):
    engine, plan = Engine(llama, kv_budget=BUDGET), APE(0.3, 0.5).plan(random_graph(2))
    result = engine.wait(engine.submit(plan, SamplingParams(max_tokens=8, ignore_eos=True)))
    assert result.token_ids == dense_greedy(llama, plan, 8)


def test_bf16_groups_are_as_near_as_bf16_is(llama):
    half = models.wrap(families.FAMILIES["llama"]().to(torch.bfloat16))
    plan = APE().plan(random_graph(3))
    exact = dense_logits(llama, plan)
    ours, dense = (x.float() - exact for x in (Engine(half, kv_budget=BUDGET).logits(plan), dense_logits(half, plan)))
    assert ours.abs().max() <= 2 * dense.abs().max()


def test_grouped_spans_are_stored_under_their_groups(llama, tmp_path):
    """A cached reader that weighs its sources differently is another record; so is none of the plain ones."""
    source = contiguous([5, 6, 7], 0)

    def plan(*groups: Group) -> Plan:
        reader = contiguous([8, 9], 3, [Place(0, 0, group=len(groups))], groups=groups)
        return Plan((source, reader, contiguous([1, 2], 5, [Place(0, 0), Place(1, 3)], cached=False)))

    plans = [plan(), plan(Group(0.5, 0.8)), plan(Group(0.5, 0.9))]
    with Engine(llama, store=tmp_path, kv_budget=BUDGET) as engine:
        cold = [engine.logits(p) for p in plans]
        warm = [engine.logits(p) for p in plans]  # cold, the prompt ran beside what it reads, and was rounded otherwise
        engine.flush()
        assert len({key for p in plans for key in p.keys(llama.fingerprint) if key}) == 4
    with Engine(llama, store=tmp_path, kv_budget=BUDGET) as engine:
        for p, logits in zip(plans, warm, strict=True):
            result = engine.wait(engine.submit(p, SamplingParams(max_tokens=1), first_logits=True))
            assert result.usage.document_tokens_computed == 0 and torch.equal(result.first_logits, logits)
            assert (logits - dense_logits(llama, p)).abs().max() <= 1e-4
    torch.testing.assert_close(torch.stack(warm), torch.stack(cold), atol=1e-4, rtol=0)
    assert (cold[0] - cold[1]).abs().max() > 1e-3 and (cold[1] - cold[2]).abs().max() > 1e-3


@settings(max_examples=draws(25))
@given(strategies.graphs(VOCAB, edges=False))
def test_ape_without_weights_is_pcw_with_a_shared_prefix(llama, graph):
    engine = Engine(llama, kv_budget=BUDGET)
    ape, pcw = (engine.logits(m.plan(graph)) for m in (APE(1.0, 1.0), PCW(shared_prefix=True)))
    assert (ape - pcw).abs().max() <= 1e-4


@settings(max_examples=draws(25))
@given(strategies.graphs(VOCAB, edges=False))
def test_pcw_is_graph_kv_without_edges(llama, graph):
    assert PCW().plan(graph) == GraphKV().plan(graph)
    engine = Engine(llama, kv_budget=BUDGET)
    assert (engine.logits(PCW().plan(graph)) - engine.logits(GraphKV().plan(graph))).abs().max() <= 1e-4


def test_a_released_style_prompt(llama):
    """APE as its code lays it out: one prefix, contexts side by side after it, the query after the longest."""
    graph = ContextGraph([[10, 11, 12], [20]], query=[30, 31], prefix=[1, 2])
    d = APE(0.9, 0.9).plan(graph).dense()
    assert sorted(zip(d.positions.tolist(), d.tokens.tolist(), strict=True)) == [
        (0, 1), (1, 2), (2, 10), (2, 20), (3, 11), (4, 12), (5, 30), (6, 31),
    ]  # fmt: skip
    grouped = {int(t) for t in d.tokens[d.group[-1] > 0]}
    assert grouped == {10, 11, 12, 20} and d.groups == (Group(0.9, 0.9 * 0.9),)
    assert not d.group[:-2].any()  # documents are encoded with plain attention
