"""Attention with operands of 16 bits on a CPU: against a naive float64 softmax of the same rounded queries.

The kernel rounds queries, and the weights of the softmax. Rounded queries are given here, so scores and log-sum-exps are exact
to float32; a weight is off by 2^-9 of itself at most, and so is the output, in numbers of the largest value.
"""

from __future__ import annotations

import random

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import families
from kvgraph import ContextGraph, Engine, models
from kvgraph.attention.backends import cpu
from kvgraph.attention.backends.base import Part
from parts import Problem, check_threads, naive, need_the_instruction, problem
from soak import draws

WEIGHT = 2**-9  # half of the distance of two bfloat16 numbers, relative to the smaller


@pytest.fixture(autouse=True)
def needs_the_instruction():
    need_the_instruction()


def check(case: Problem, scale: float = 0.25) -> None:
    q = case.q.bfloat16().float()
    out, lse = cpu.attend(q, case.parts, scale)
    for part in case.parts:
        expected, expected_lse = naive(q, part, scale, None)
        torch.testing.assert_close(lse[:, part.columns].double(), expected_lse, atol=1e-5, rtol=1e-5)
        error = (out[:, part.columns].double() - expected).abs().max()
        assert error <= WEIGHT * part.values.abs().max() + 1e-5


kinds = st.tuples(st.sampled_from(["open", "causal", "mask"]), st.integers(1, 150), st.integers(1, 200))
problems = st.builds(
    lambda seed, groups, repeat, dims, kinds: problem(seed, groups, repeat, *dims, torch.bfloat16, None, kinds),
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([(8, 8), (64, 64), (80, 80), (128, 128), (16, 24), (192, 128)]),
    st.lists(kinds, min_size=1, max_size=4),
)


@given(case=problems)
@settings(max_examples=draws(40), deadline=None)
def test_equals_naive_softmax(case: Problem):
    check(case)


@pytest.mark.parametrize("repeat", [1, 7])
def test_long_parts(repeat):
    check(
        problem(
            0, 2, repeat, 64, 64, torch.bfloat16, None, [("open", 40, 5000), ("causal", 900, 900), ("mask", 60, 3000)]
        )
    )


def test_a_row_that_sees_nothing_of_a_tile():
    case = problem(0, 1, 2, 16, 16, torch.bfloat16, None, [("mask", 20, 200)])
    mask = torch.zeros(20, 200, dtype=torch.bool)
    mask[torch.arange(20), torch.arange(20) * 10] = True
    check(case._replace(parts=[case.parts[0]._replace(mask=mask)]))


def test_a_mask_lies_as_it_likes():
    """numpy lays out a copy of what was broadcast column by column, and so are the masks of chosen tokens."""
    case = problem(0, 2, 2, 16, 16, torch.bfloat16, None, [("mask", 20, 200), ("mask", 9, 70)])
    expected = cpu.attend(case.q, case.parts, 0.25)
    turned = [part._replace(mask=part.mask.T.contiguous().T) for part in case.parts]
    assert not any(part.mask.is_contiguous() for part in turned)
    assert all(torch.equal(a, b) for a, b in zip(cpu.attend(case.q, turned, 0.25), expected, strict=True))
    wide = torch.zeros(20, 400, dtype=torch.bool)
    wide[:, ::2] = case.parts[0].mask
    apart = [case.parts[0]._replace(mask=wide[:, ::2]), case.parts[1]]
    assert all(torch.equal(a, b) for a, b in zip(cpu.attend(case.q, apart, 0.25), expected, strict=True))


def test_large_scores_do_not_overflow():
    case = problem(0, 1, 2, 16, 16, torch.bfloat16, None, [("open", 20, 300), ("causal", 90, 90), ("mask", 20, 30)])
    out, lse = cpu.attend(case.q * 1000, case.parts, 1.0)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all() and lse.abs().max() > 100


@pytest.mark.parametrize("at", [0, 31, 63, 64, 89])
def test_what_is_not_a_number_is_not_hidden(at):
    case = problem(0, 1, 2, 16, 16, torch.bfloat16, None, [("open", 20, 90), ("open", 1, 90)])
    case.parts[0].keys[0, at] = torch.nan
    case.parts[1].values[0, at] = torch.nan
    out, lse = cpu.attend(case.q, case.parts, 0.25)
    assert out.isnan().all() and lse[:, :20].isnan().all() and not lse[:, 20:].isnan().any()


def test_a_chain_brings_new_keys_in_float32():
    case = problem(0, 1, 2, 64, 64, torch.bfloat16, None, [("causal", 90, 90)])
    part = case.parts[0]
    wide = cpu.attend(case.q, [part._replace(keys=part.keys.float())], 0.125)
    assert all(torch.equal(a, b) for a, b in zip(wide, cpu.attend(case.q, [part], 0.125), strict=True))


def test_it_is_another_code_than_without_the_instruction(monkeypatch):
    case = problem(0, 3, 3, 64, 64, torch.bfloat16, None, [("open", 20, 300)])
    out, _ = cpu.attend(case.q, case.parts, 0.125)
    monkeypatch.setattr(cpu, "halves", lambda: None)
    expected, _ = cpu.attend(case.q, case.parts, 0.125)
    assert not torch.equal(out, expected)
    torch.testing.assert_close(out, expected, atol=0.01, rtol=0)


def test_what_it_is_not_for(monkeypatch):
    """Softcaps, odd head sizes and other dtypes have exact products as before."""

    def refused(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(cpu.halves(), "attend", refused)
    for dim, dtype, softcap in (
        (64, torch.float16, None),
        (64, torch.float32, None),
        (63, torch.bfloat16, None),
        (64, torch.bfloat16, 5.0),
    ):
        case = problem(0, 1, 2, dim, dim, dtype, None, [("open", 20, 30)])
        cpu.attend(case.q, case.parts, 0.125, softcap)
    with pytest.raises(AssertionError, match="asked"):
        cpu.attend(
            problem(0, 1, 2, 64, 64, torch.bfloat16, None, [("open", 20, 30)]).q,
            [Part(slice(0, 20), *torch.zeros(2, 1, 9, 64).bfloat16())],
            1.0,
        )


def test_threads_share_the_work_and_change_nothing(monkeypatch):
    case = problem(1, 3, 3, 64, 64, torch.bfloat16, None, [("open", 300, 500), ("causal", 400, 400), ("open", 30, 900)])
    check_threads(case, monkeypatch)


@pytest.mark.parametrize("name", ["CPU_NAME", "CPU_FEATURES"])
def test_code_for_another_processor_goes_without_it(monkeypatch, name):
    monkeypatch.setattr(numba.config, name, "generic")
    assert cpu.halves.__wrapped__() is None


def test_no_record_is_shared_with_exact_products(monkeypatch):
    hf = families.FAMILIES["llama"]()
    half, whole = models.wrap(hf.bfloat16()).fingerprint, models.wrap(hf.float()).fingerprint
    capped = models.wrap(families.FAMILIES["gemma2"]().bfloat16())
    monkeypatch.setattr(cpu, "halves", lambda: None)
    assert models.wrap(hf.bfloat16()).fingerprint != half
    assert models.wrap(hf.float()).fingerprint == whole
    assert models.wrap(capped.hf).fingerprint == capped.fingerprint  # softcaps have exact products


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("method", ["full", "block", "graph-kv", "ape", "epic:k=8", "cacheblend:ratio=0.3"])
def test_a_model_in_bfloat16_answers_as_with_exact_products(family, method, monkeypatch):
    """Long documents, so that parts have many columns; logits differ as much as other roundings make them."""
    model = models.wrap(families.FAMILIES[family]().bfloat16())
    rng = random.Random(0)
    documents = [[rng.randrange(3, 128) for _ in range(n)] for n in (40, 70, 33)]
    graph = ContextGraph(
        documents, [rng.randrange(3, 128) for _ in range(20)], edges=[(0, 1), (1, 2)] if method == "graph-kv" else ()
    )

    def found() -> Tensor:
        with Engine(model) as engine:
            return engine.logits(engine.plan(graph, method))

    half = found()
    monkeypatch.setattr(cpu, "halves", lambda: None)
    exact = found()
    assert not torch.equal(half, exact)
    assert (half - exact).abs().max() < 0.1 * exact.std()
