"""The Triton backend against the reference. Run by test_triton.py in a process of its own: compiled on a CUDA machine,
in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

from kvgraph.attention.backends import reference, triton
from kvgraph.attention.backends.base import Part

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-5


def problem(dtype, heads, groups, dim, value_dim, parts):
    """Random q [H, C, D] and parts of (columns, keys, kind) whose keys and values lie scattered in larger tensors."""
    q_parts, at = [], 0
    for n, total, kind in parts:
        keys = torch.randn(groups, total + 3, dim, device=DEVICE).to(dtype)[:, 2 : 2 + total]
        values = torch.randn(total, groups, value_dim, device=DEVICE).to(dtype).transpose(0, 1)
        mask = None
        if kind == "mask":
            mask = torch.rand(n, total, device=DEVICE) < 0.4
            mask[:, int(torch.randint(total, ()))] = True
        q_parts.append(Part(slice(at, at + n), keys, values, mask, kind == "causal"))
        at += n
    return torch.randn(at, heads, dim, device=DEVICE).transpose(0, 1), q_parts


def check(q, parts, scale, softcap=None):
    out, lse = triton.attend(q, parts, scale, softcap)
    expected, expected_lse = reference.attend(q, parts, scale, softcap)
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse, expected_lse, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture
def split(monkeypatch):
    """Short runs of keys, so that small problems are split and merged too."""
    monkeypatch.setattr(triton, "MIN_KEYS", 24)
    monkeypatch.setattr(triton, "_multiprocessors", lambda device: 64)
    triton._schedule.cache_clear()
    yield
    triton._schedule.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 2), (5, 1)])
def test_every_kind_of_part_in_one_call(dtype, heads, groups):
    parts = [(5, 70, "open"), (21, 21, "causal"), (3, 9, "mask"), (1, 1, "causal"), (1, 40, "open")]
    check(*problem(dtype, heads, groups, 16, 16, parts), 0.25)


@pytest.mark.parametrize("dim, value_dim", [(16, 16), (64, 64), (80, 80), (96, 48), (24, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(dtype, dim, value_dim):
    check(*problem(dtype, 4, 2, dim, value_dim, [(9, 37, "open"), (12, 12, "causal")]), dim**-0.5)


@pytest.mark.parametrize("softcap", [2.0, 50.0])
@pytest.mark.parametrize("kind", ["open", "mask"])
def test_softcap(softcap, kind):
    check(*problem(torch.float32, 4, 2, 32, 32, [(7, 50, kind), (10, 10, "causal")]), 1.0, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_split_over_keys(split, dtype):
    q, parts = problem(dtype, 6, 2, 24, 40, [(1, 500, "open"), (30, 100, "mask"), (50, 50, "causal"), (1, 1, "open")])
    schedule = triton._schedule(tuple((p.columns.start, p.columns.stop - p.columns.start, p.keys.shape[1], p.causal)
                                      for p in parts), 2, 3, triton.LARGE, DEVICE)  # fmt: skip
    assert schedule.merges[0, -1] > 16  # the long part has more splits than the merge kernel reads at a time
    check(q, parts, 0.2)


def test_a_split_that_a_row_does_not_see_weighs_nothing(split):
    q, parts = problem(torch.float32, 2, 2, 16, 16, [(2, 120, "open")])
    mask = torch.zeros(2, 120, dtype=torch.bool, device=DEVICE)
    mask[0, 3] = mask[1, 110:] = True
    check(q, [parts[0]._replace(mask=mask)], 0.2)


def test_several_tiles_of_rows():
    check(*problem(torch.float32, 8, 2, 16, 16, [(45, 45, "causal"), (40, 33, "mask"), (37, 20, "open")]), 0.25)


def test_rejects_what_it_cannot_read():
    q, (part,) = problem(torch.float32, 2, 2, 16, 16, [(2, 5, "open")])
    with pytest.raises(ValueError, match="one dtype"):
        triton.attend(q, [part._replace(values=part.values.half())], 1.0)
    scattered = torch.randn(2, 16, 5, device=DEVICE).transpose(1, 2)
    with pytest.raises(ValueError, match="last dimension"):
        triton.attend(q, [part._replace(keys=scattered)], 1.0)
