"""Attention of a step by the Triton kernels against the same step in plain torch. Run by test_triton.py in a process of
its own: compiled on a CUDA machine, in Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch

from kvgraph.attention import cuda
from kvgraph.attention.cuda import Attention, CudaStep, Tables, Tuning, fixed_sizes
from kvgraph.attention.rope import Rotary
from kvgraph.attention.rows import Row, RowKV, View
from kvgraph.attention.step import Step
from soak import SOAK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter takes milliseconds a tile and head: there, each kind of case runs once, with one dtype or the other, and
# only `test_every_kind_of_row` has several heads that share keys.
ALL = DEVICE.type == "cuda" or SOAK
HEADS, GROUPS = (4, 2) if ALL else (2, 1)
# Largest difference relative to the largest value: in 16 bits, weights and queries are rounded before the products.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Layer(NamedTuple):
    rotary: int | None
    window: int | None
    kv_heads: int
    key_dim: int
    value_dim: int


class Problem(NamedTuple):
    rows: list[Row]
    layers: list[Layer]
    rotaries: list[Rotary]
    heads: int


def kv(layers: list[Layer], capacity: int, filled: int, dtype: torch.dtype, positions=None) -> RowKV:
    made = RowKV([(x.kv_heads, x.key_dim, x.value_dim) for x in layers], capacity, dtype, DEVICE)
    made.buffer.copy_(torch.randn(made.buffer.shape))
    made.positions[:] = np.arange(capacity) if positions is None else positions
    made.length = filled
    return made


def problem(seed=0, dtype=torch.float32, heads=HEADS, groups=GROUPS, dim=16, value_dim=None, rotated=None, interleaved=False,
            window=None, grouped=False, gaps=False, long=50) -> Problem:  # fmt: skip
    """Rows of every kind: encoding with and without a past, decoding on shared records, a prompt span with gaps."""
    torch.manual_seed(seed)
    layers = [Layer(0, None, groups, dim, value_dim or dim), Layer(0, window, groups, dim, value_dim or dim)]
    if window is None:
        layers[1] = Layer(None, None, groups, dim, value_dim or dim)
    turned = dim if rotated is None else rotated
    rotary = Rotary(1e4 ** -(torch.arange(turned // 2, dtype=torch.float64) / max(1, turned // 2)), interleaved)
    records = [kv(layers, n, n, dtype).record("0" * 64) for n in (7, long, 33)]

    def view(i: int, at: int, lo=0, hi=None, group=0):
        weights = (group, 0.5 + group, 0.8) if group else ()
        hidden = [(3, 5), (10, 20)] if gaps and i == 2 else ()
        return View(records[i], at, lo, hi or len(records[i]), *(weights or (0, 1.0, 1.0)), gaps=hidden)

    def row(n: int, views, past=0, positions=None, room=0):
        positions = np.arange(past + n) if positions is None else positions
        own = kv(layers, past + n + room, past, dtype, np.append(positions, np.zeros(room, np.int64)))
        return Row([1] * n, positions[past : past + n], views, own)

    g = 1 if grouped else 0
    rows = [
        row(23, []),
        row(1, [view(0, -7), view(1, -7 - long, group=g), view(2, -140, group=2 * g)], past=4, room=9),
        row(1, [view(0, -7), view(1, -7 - long, group=g)], past=30, room=2),
        row(4, [view(2, -33, 2, 30), view(1, -4), view(0, -7)], positions=np.array([0, 5, 6, 31])),
        row(1, []),
    ]
    if ALL or not grouped:  # merging the groups of so many tokens takes seconds in the interpreter
        rows.append(row(16 * groups // heads + 1, [view(1, -long)], past=5))  # too many queries for a small tile
    source = rows[0].kv  # a reader beside its source
    rows.append(Row([1] * 3, np.arange(3), [View(source, -23, 0, 23)], kv(layers, 3, 0, dtype)))
    # A chain of three rows; the first has a past.
    rows.append(row(2, [view(0, -9), view(1, -9 - long)], past=6))
    rows.append(Row([1] * 4, np.arange(4), (), kv(layers, 4, 0, dtype), joined=True, lead=8))
    rows.append(Row([1] * 2, np.arange(2), (), kv(layers, 2, 0, dtype), joined=True, lead=14))
    return Problem(rows, layers, [rotary], heads)


def inputs(p: Problem, dtype: torch.dtype):
    size = sum(len(row.tokens) for row in p.rows)
    layer = p.layers[0]

    def random(heads, dim):
        return torch.randn(size, heads, dim, device=DEVICE).to(dtype).transpose(0, 1)

    return (
        random(p.heads, layer.key_dim),
        random(layer.kv_heads, layer.key_dim),
        random(layer.kv_heads, layer.value_dim),
    )


def attention_of(step: CudaStep, fixed: bool = False) -> Attention:
    if not fixed:
        return step.on_device(torch.empty(step.length, dtype=torch.int64, pin_memory=DEVICE.type == "cuda"))[1]
    size = 1 << (step.size - 1).bit_length()
    tables = Tables(DEVICE, fixed_sizes(size, size), step.windows, step.flags.groups, step.scratch(size))
    assert tables.sizes.holds(step.sizes)
    staging = torch.full((tables.layout.end,), -1, dtype=torch.int64)  # what isn't filled must not be read
    tables.fill(step, staging)
    flags = step.flags._replace(large=True, merges=True)
    return Attention(tables, flags, step.layers, step.rotaries, step.tune)


def check(p: Problem, scale=0.3, softcap=None, sinks=False, fixed=False, layers=(0, 1)) -> None:
    """Compare all layers, in the interpreter these ones."""
    dtype = p.rows[0].kv.buffer.dtype
    plain = Step(p.rows, p.layers, p.rotaries, DEVICE)
    if DEVICE.type == "cuda":
        from kvgraph.attention.backends import reference

        plain.backend = reference.attend
    step = CudaStep(p.rows, [], p.layers, p.rotaries, DEVICE, p.heads)
    attention = attention_of(step, fixed)
    for layer in range(len(p.layers)) if ALL else layers:
        q, k, v = inputs(p, dtype)
        sink = torch.randn(p.heads, device=DEVICE) if sinks else None
        expected = plain(layer, q, k, v, scale, softcap, sink).float()
        written = [row.kv.buffer.clone() for row in p.rows]
        for row in p.rows:  # the new tokens' KV, to be written again
            row.kv.keys[layer][:, row.kv.length : row.kv.length + len(row.tokens)] = 0
        filled = attention.tables.sizes.tokens
        if filled > q.shape[1]:
            q, k, v = (torch.cat([t, t[:, :1].expand(-1, filled - t.shape[1], -1)], 1) for t in (q, k, v))
        found = attention(layer, q, k, v, scale, softcap, sink)[:, : expected.shape[1]].float()
        for row, buffer in zip(p.rows, written, strict=True):
            assert torch.equal(row.kv.buffer.nan_to_num(), buffer.nan_to_num())
        worst = float((found - expected).abs().max() / expected.abs().max())
        assert worst <= TOLERANCE[dtype], f"layer {layer} is off by {worst}"


FULL, HALF = torch.float32, torch.float16
DTYPES = [FULL, HALF] + [torch.bfloat16] * (DEVICE.type == "cuda")
SIZES = [(64, 64), (80, 48), (24, 128)] + [(96, 96), (128, 128), (256, 256)] * (DEVICE.type == "cuda")


def cases(names: str, few: Sequence[object], every: Iterable[object]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(names, list(every) if ALL else few)


@cases(
    "dtype, shape, layer",
    [(HALF, (6, 2), 0)],
    product(DTYPES, [(2, 2), (6, 2), (5, 1)], [0]),
)
def test_every_kind_of_row(dtype, shape, layer):
    heads, groups = shape
    check(problem(dtype=dtype, heads=heads, groups=groups), layers=(layer,))


@cases("dtype, dims, layer", [(FULL, SIZES[-1], 0)], product(DTYPES, SIZES, [0]))
def test_head_sizes(dtype, dims, layer):
    dim, value_dim = dims
    check(problem(1, dtype, heads=HEADS, groups=2, dim=dim, value_dim=value_dim), scale=dim**-0.5, layers=(layer,))


@cases("rotated, interleaved", [(8, True)], product([8, 16], [False, True]))
def test_rotations(rotated, interleaved):
    check(problem(2, rotated=rotated, interleaved=interleaved), layers=(0,))


@cases("softcap", [2.0], [2.0, 50.0])
def test_softcap(softcap):
    check(problem(3), softcap=softcap, layers=(1,))


@cases("grouped", [False], [False, True])
def test_sinks(grouped):
    check(problem(4, grouped=grouped), sinks=True, layers=(0,))


@cases("softcap, sinks", [(5.0, True)], product([None, 5.0], [False, True]))
def test_groups_with_temperature_and_scale(softcap, sinks):
    check(problem(5, grouped=True), softcap=softcap, sinks=sinks, layers=(1,))


@cases("dtype", [HALF], DTYPES)
def test_windows_and_hidden_keys(dtype):
    check(problem(6, dtype, window=25, gaps=True))


@cases("dtype", [FULL], DTYPES)
def test_keys_split_into_runs(dtype, monkeypatch):
    monkeypatch.setattr(cuda, "MIN_KEYS", 16)
    rows, keys = (128, 64) if DEVICE.type == "cuda" else (32, 16)
    monkeypatch.setattr(cuda, "tuning", lambda *_: Tuning(rows, keys, (4, 4), 2, (10_000, 10_000)))
    monkeypatch.setattr(cuda, "merging", lambda tokens: (16, 2))
    p = problem(7, dtype, long=2000 if DEVICE.type == "cuda" else 240, groups=1, grouped=ALL)
    step = CudaStep(p.rows, [], p.layers, p.rotaries, DEVICE, p.heads)
    _, first, last = step.tables[0].merged.T
    assert (last - first).max() > 16  # more than `merge` reads at once
    check(p, layers=(0,))


@cases("grouped", [False], [False, True])
def test_tables_of_fixed_sizes(grouped):
    p = problem(8, grouped=grouped)
    del p.rows[3]  # the one that needs a mask
    check(p, fixed=True, layers=(1,))


def test_rejects_kv_in_pieces():
    p = problem(9)
    record = p.rows[1].views[0].source
    pieces = type(record)(record.key, tuple(k.clone() for k in record.keys), record.values, record.positions)
    with pytest.raises(ValueError, match="one buffer"):
        cuda.address(pieces, sum(x.kv_heads * (x.key_dim + x.value_dim) for x in p.layers))
