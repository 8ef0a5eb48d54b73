"""Parts of attention drawn at random, and a naive float64 softmax over them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kvgraph.attention.backends import cpu
from kvgraph.attention.backends.base import Part


def softmax_of(scores: Tensor, visible: Tensor, values: Tensor, softcap: float | None, sinks: Tensor | None = None):
    """scores [H, n, N], visible [n, N], values [H, N, Dv], float64 -> out [H, n, Dv], lse [H, n]; sinks [H]."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(visible, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return weights / total @ values, total[..., 0].log()


def naive(q: Tensor, part: Part, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    repeat = q.shape[0] // part.keys.shape[0]
    keys, values = (t.double().repeat_interleave(repeat, 0) for t in (part.keys, part.values))
    scores = q[:, part.columns].double() @ keys.transpose(1, 2) * scale
    visible = torch.ones(scores.shape[1:], dtype=torch.bool) if part.mask is None else part.mask
    return softmax_of(scores, visible.tril() if part.causal else visible, values, softcap)


def need_the_instruction() -> None:
    """Skip a test loudly where the kernels for bfloat16 can't run."""
    if cpu.halves() is None:
        reason = "this processor doesn't multiply bfloat16, so its kernels of attention are NOT checked"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)


class Problem(NamedTuple):
    q: Tensor
    parts: list[Part]
    softcap: float | None


def problem(
    seed: int, groups: int, repeat: int, dim: int, value_dim: int, dtype, softcap, kinds: list[tuple[str, int, int]]
) -> Problem:
    """kinds: (open | causal | mask, columns, keys). Keys and values are slices and transposes of larger tensors."""
    torch.manual_seed(seed)
    parts, at = [], 0
    for kind, n, total in kinds:
        total = n if kind == "causal" else total
        keys = torch.randn(groups, total + 3, dim).to(dtype)[:, 1 : 1 + total]
        values = torch.randn(total, groups, value_dim).to(dtype).transpose(0, 1)
        mask = None
        if kind == "mask":
            mask = torch.rand(n, total) < 0.5
            mask[torch.arange(n), torch.randint(total, (n,))] = True
        parts.append(Part(slice(at, at + n), keys, values, mask, kind == "causal"))
        at += n
    return Problem(torch.randn(at, groups * repeat, dim).transpose(0, 1), parts, softcap)


def check_threads(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads share the work of the CPU's backend, and its results are those of one, bit by bit."""
    check_shared(lambda: cpu.attend(case.q, case.parts, 0.125), monkeypatch)


def check_shared(compute: Callable[[], Sequence[Tensor]], monkeypatch: pytest.MonkeyPatch, calls: int = 1) -> None:
    """Three threads share each of a computation's calls of a kernel, and its results are those of one, bit by bit."""
    alone = compute()
    shared, original = [], ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *args: shared.append(args[-2:]) or original(*args))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = compute()
    finally:
        torch.set_num_threads(before)
    assert len(shared) == 2 * calls and all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
