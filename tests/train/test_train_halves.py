"""Attention for 16-bit training on a CPU: against PyTorch's in float64, value and gradients.

It rounds queries, keys and values, weights, and the gradients of scores, each by 2^-9 of itself at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parts import check_shared, need_the_instruction
from soak import draws


@pytest.fixture(autouse=True)
def needs_the_instruction():
    need_the_instruction()


class Case:
    """Examples of these lengths in one sequence; a row sees itself, and this share of the rows before it."""

    def __init__(
        self, seed: int, groups: int, repeat: int, dim: int, value_dim: int, lengths: Sequence[int], share: float
    ):
        torch.manual_seed(seed)
        total = sum(lengths)
        self.repeat, self.scale = repeat, 0.3
        self.q = torch.randn(total, groups * repeat, dim).transpose(0, 1)  # as a layer's projections lie
        self.k, self.v = torch.randn(groups, total, dim), torch.randn(groups, total, value_dim)
        self.visible = [torch.eye(n, dtype=torch.bool) | (torch.rand(n, n) < share).tril() for n in lengths]
        self.above = torch.randn(groups * repeat, total, value_dim).bfloat16()

    def found(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The output, and the gradients of q, k and v."""
        given = [t.to(dtype, copy=True).requires_grad_() for t in (self.q, self.k, self.v)]
        out = attend(*given)
        return [out.detach(), *torch.autograd.grad(out, given, self.above.to(out.dtype))]

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(self.repeat, 0) for t in (k, v))
        mask = torch.block_diag(*self.visible).bool()
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from kvgraph.train.halves import PackedAttention, Visibility

        return PackedAttention.apply(q, k, v, Visibility(self.visible, self.repeat), self.scale)


def check(case: Case) -> None:
    exact, ours = case.found(case.plain, torch.float64), case.found(case.ours, torch.float32)
    for expected, mine in zip(exact, ours, strict=True):
        error = (mine - expected).norm()
        noise = 1e-3 * mine.numel() ** 0.5  # where a row sees only itself, the exact gradient is 0
        assert mine.shape == expected.shape and error <= 3e-2 * expected.norm() + noise


cases = st.builds(
    lambda seed, groups, repeat, dims, lengths, share: Case(seed, groups, repeat, *dims, lengths, share),
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from([(8, 6), (64, 64), (80, 80), (128, 64), (16, 130)]),
    st.lists(st.integers(1, 200), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)


@given(case=cases)
@settings(max_examples=draws(30), deadline=None)
def test_equals_pytorchs_in_float64(case: Case):
    check(case)


@pytest.mark.parametrize("share", [0.001, 1.0])
def test_long_examples(share):
    check(Case(0, 2, 3, 64, 64, [900, 30], share))


def test_is_as_near_to_the_exact_gradients_as_pytorchs_in_bfloat16():
    case = Case(0, 2, 3, 64, 64, [300, 90], 0.5)
    exact, ours, theirs = (
        case.found(case.plain, torch.float64),
        case.found(case.ours, torch.float32),
        case.found(case.plain, torch.bfloat16),
    )
    for expected, mine, other in zip(exact, ours, theirs, strict=True):
        assert (mine - expected).norm() < 1.05 * (other - expected).norm()


def test_gradients_have_the_types_of_what_they_belong_to():
    case = Case(0, 1, 2, 16, 16, [40], 1.0)
    assert {t.dtype for t in case.found(case.ours, torch.bfloat16)} == {torch.bfloat16}
    out, *gradients = case.found(case.ours, torch.float32)
    assert out.dtype == torch.bfloat16 and {t.dtype for t in gradients} == {torch.float32}


def test_what_a_row_does_not_see_changes_nothing():
    """Whatever other rows hold: the scores between them and this one may be large."""
    case = Case(0, 1, 2, 16, 16, [150], 0.0)
    case.visible[0][100:] = True
    case.visible[0].tril_()
    case.above[:, 100:] = 0
    before = case.found(case.ours, torch.float32)
    case.k[:, 50], case.v[:, 50] = 1e4, 1e4
    after = case.found(case.ours, torch.float32)
    others = [i for i in range(100) if i != 50]
    assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(t).all() for t in after)


@pytest.mark.parametrize("lengths", [[400, 130, 300], [700]])
def test_threads_change_nothing(lengths, monkeypatch):
    case = Case(0, 3, 3, 64, 64, lengths, 1.0)
    check_shared(lambda: case.found(case.ours, torch.float32), monkeypatch, calls=2)
