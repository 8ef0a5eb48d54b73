"""Backends against a naive float64 softmax, and Step against a dense computation that shares nothing between rows."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba.core.caching import FunctionCache
from torch import Tensor

from kvgraph.attention.backends import backend_for, compiled, cpu, jit, reference
from kvgraph.attention.backends.base import Backend, Part
from kvgraph.attention.rope import Rotary
from kvgraph.attention.rows import Row, RowKV, View, on_device
from kvgraph.attention.step import Step
from kvgraph.store.record import Record
from parts import Problem, check_threads, naive, problem, softmax_of
from soak import draws


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Products of float32 numbers everywhere, for narrow tolerances. test_halves.py is about the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "halves", lambda: None)
        yield


def torch_alone(*args) -> tuple[Tensor, Tensor]:
    """The CPU's backend where Numba isn't installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "compiled", lambda: None)
        return cpu.attend(*args)


BACKENDS = [cpu.attend, torch_alone, reference.attend]
NAMES = ["cpu", "torch", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 1e-5


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=TOLERANCE, rtol=TOLERANCE)


# --- backends ---------------------------------------------------------------------------------------------------------


kinds = st.tuples(st.sampled_from(["open", "causal", "mask"]), st.integers(1, 12), st.integers(1, 40))
head_sizes = st.sampled_from([(8, 8), (16, 16), (24, 24), (16, 8), (8, 24)])
problems = st.builds(
    lambda seed, groups, repeat, dims, dtype, softcap, kinds: problem(
        seed, groups, repeat, *dims, dtype, softcap, kinds
    ),
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 4),
    head_sizes,
    st.sampled_from(DTYPES),
    st.sampled_from([None, 1.0, 30.0]),
    st.lists(kinds, min_size=1, max_size=4),
)


def check(backend: Backend, case: Problem, scale: float = 0.25) -> None:
    out, lse = backend(case.q, case.parts, scale, case.softcap)
    for part in case.parts:
        expected, expected_lse = naive(case.q, part, scale, case.softcap)
        close(out[:, part.columns], expected)
        close(lse[:, part.columns], expected_lse)


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@pytest.mark.parametrize("tiles", [None, 8], ids=["whole", "tiled"])
@given(case=problems)
@settings(max_examples=draws(40), deadline=None)
def test_backend_equals_naive_softmax(backend: Backend, tiles: int | None, case: Problem):
    with pytest.MonkeyPatch.context() as patch:
        if tiles is not None:
            patch.setattr(cpu, "TILE", tiles)  # keys converted at a time
            patch.setattr(reference, "TILE", 16 * tiles)  # scores held at a time
        check(backend, case)


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_parts(backend: Backend, dtype):
    long = [("open", 3, 5000), ("causal", 700, 700), ("mask", 40, 3000), ("open", 1, 2 * cpu.TILE + 1)]
    check(backend, problem(0, 2, 2, 16, 16, dtype, None, long))


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
def test_large_scores_do_not_overflow(backend: Backend):
    case = problem(0, 1, 2, 16, 16, torch.float32, None, [("open", 4, 30), ("causal", 9, 9), ("mask", 4, 30)])
    out, lse = backend(case.q * 1000, case.parts, 1.0, None)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all() and lse.abs().max() > 100


def test_the_cpu_has_the_fused_backend():
    assert backend_for(torch.device("cpu")) is cpu.attend


# --- the compiled kernel of few columns --------------------------------------------------------------------------------


def few(seed: int, dtype, sizes: list[tuple[int, int]], dim: int = 64) -> Problem:
    return problem(seed, 3, 3, dim, dim, dtype, None, [("open", n, total) for n, total in sizes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [6, 64, 80])
def test_the_compiled_kernel_takes_decoding_parts_and_equals_torch(monkeypatch, dtype, dim):
    edges = [1, 3, compiled.TILE - 1, compiled.TILE, compiled.TILE + 1, 2 * compiled.TILE + 2, 1000]
    case = few(0, dtype, [(1 + i % 2, total) for i, total in enumerate(edges)], dim)
    assert all(cpu._few(part, case.q.shape[0]) for part in case.parts)
    out, lse = cpu.attend(case.q, case.parts, 0.125)
    monkeypatch.setattr(cpu, "compiled", lambda: None)
    expected, expected_lse = cpu.attend(case.q, case.parts, 0.125)
    assert not torch.equal(out, expected), "it was the same code"
    close(out, expected)
    close(lse, expected_lse)


def test_what_the_compiled_kernel_is_not_for():
    kinds = [("causal", 3, 3), ("mask", 1, 9), ("open", 5, 9), ("open", 1, 9)]
    case = problem(0, 3, 3, 16, 16, torch.float32, None, kinds)
    assert [cpu._few(part, 9) for part in case.parts] == [False, False, False, True]
    assert not cpu._few(few(0, torch.float16, [(1, 9)]).parts[0], 9)


def test_threads_share_long_parts_and_change_nothing(monkeypatch):
    case = few(1, torch.bfloat16, [(1, 5000), (1, 7), (1, 11000)])
    check_threads(case, monkeypatch)


def test_a_forked_process_has_threads_of_its_own():
    case = few(1, torch.bfloat16, [(1, 20000), (1, 20000)])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = cpu.attend(case.q, case.parts, 0.125)[0]
        child = multiprocessing.get_context("fork").Process(target=lambda: compare(case, expected))
        child.start()
        child.join(60)
    finally:
        torch.set_num_threads(before)
        child.kill()
    assert child.exitcode == 0


def compare(case: Problem, expected: Tensor) -> None:
    out, lse = torch.empty_like(expected), torch.empty(expected.shape[:2])
    compiled.attend(case.q, case.parts, 0.125, out, lse)
    os._exit(0 if torch.equal(out, expected) else 1)


def test_compiling_needs_no_room_for_its_file(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FunctionCache, "save_overload", full)
    made = jit.jit(doubled)
    numbers = np.ones(3)
    made(numbers)
    made(numbers)
    assert (numbers == 4).all()
    monkeypatch.setattr(FunctionCache, "__init__", lambda *_: no_folder())
    numbers = np.ones(3)
    jit.jit(doubled)(numbers)
    assert (numbers == 2).all()


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_loaded_whatever_the_default_dtype(default, dtype):
    """transformers changes it while it loads a model, and they are loaded beside that."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        cpu.warm(dtype)
    finally:
        torch.set_default_dtype(before)


def test_what_reads_memory_by_its_address_is_waited_for(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    done = []

    def kernel(first: int, last: int) -> None:
        if first == 0:
            raise KeyboardInterrupt
        time.sleep(0.2)
        done.append(last)

    with pytest.raises(KeyboardInterrupt):
        jit.in_threads(kernel, (), np.ones(4), 0)
    assert done == [4]


def test_a_kernel_is_compiled_again_when_what_it_shares_changes():
    assert jit.jit(tripled).__qualname__ == f"tripled_{jit.SHARED_CODE}"


def tripled(numbers):
    numbers *= 3


def doubled(numbers):
    for i in range(len(numbers)):
        numbers[i] *= 2


def no_folder():
    raise RuntimeError("cannot cache function: no locator available")


# --- steps ------------------------------------------------------------------------------------------------------------

HEADS, GROUPS, DIM, VALUE_DIM = 4, 2, 16, 16


class Layer(NamedTuple):
    rotary: int | None
    window: int | None


LAYERS = [Layer(0, None), Layer(None, None), Layer(1, 7), Layer(0, 24)]
SHAPES = [(GROUPS, DIM, VALUE_DIM)] * len(LAYERS)
ROTARIES = [
    Rotary(1e4 ** -(torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))),
    Rotary(1e2 ** -(torch.arange(DIM // 4, dtype=torch.float64) / (DIM // 4)), interleaved=True),  # half of the head
]


def moved(keys: Tensor, by: int, rotary: int | None) -> Tensor:
    """keys [G, N, D] rotated by `by` positions in float64, as complex numbers."""
    if rotary is None:
        return keys.double()
    rope = ROTARIES[rotary]
    turned, rest = keys.double()[..., : rope.dims], keys.double()[..., rope.dims :]
    pairs = turned.unflatten(-1, (-1, 2)) if rope.interleaved else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    turn = torch.polar(torch.ones_like(rope.inv_freq), by * rope.inv_freq)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return torch.cat([(pairs if rope.interleaved else pairs.transpose(-1, -2)).flatten(-2), rest], -1)


@dataclass
class Request:
    """One row of a world: `past` of its tokens are already computed. q, k, v: per layer, of all its tokens."""

    positions: np.ndarray
    past: int
    places: list[tuple[int, int, int, int, int, float, float]]  # record, at, lo, hi, group, temperature, scale
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]


@dataclass
class World:
    records: list[Record]
    requests: list[Request]
    dtype: torch.dtype
    softcap: float | None
    sinks: Tensor | None


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Rows of one step: prefills (with gaps), chunks with a past and decoding rows, over records they share."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))

    def ascending(n: int) -> np.ndarray:
        gaps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 5]), min_size=n - 1, max_size=n - 1))
        return np.cumsum([0, *gaps]).astype(np.int64)

    def tensors(heads: int, n: int, dim: int) -> list[Tensor]:
        return [torch.randn(heads, n, dim).to(dtype) for _ in LAYERS]

    records = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 9))
        keys, values = tensors(GROUPS, n, DIM), tensors(GROUPS, n, VALUE_DIM)
        records.append(Record("0" * 64, tuple(keys), tuple(values), torch.from_numpy(ascending(n))))
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 8))
        past = draw(st.sampled_from([0, n - 1, n // 2]))  # a prefill, a decoding row, a later chunk of a prefill
        places = []
        factors = st.sampled_from([0.5, 1.0, 1.7])
        weights = [(1.0, 1.0), *draw(st.just([]) | st.lists(st.tuples(factors, factors), max_size=2))]
        for _ in range(draw(st.integers(0, 4))):
            which = draw(st.integers(0, len(records) - 1))
            lo = draw(st.integers(0, len(records[which]) - 1))
            hi = draw(st.integers(lo + 1, len(records[which])))
            lo, hi = draw(st.sampled_from([(lo, hi), (0, len(records[which]))]))
            at, group = (
                draw(st.integers(-60, 20) | st.sampled_from([-12, -9, -5])),
                draw(st.sampled_from(range(len(weights)))),
            )
            places.append((which, at, lo, hi, group, *weights[group]))
        q = [t.float() for t in tensors(HEADS, n, DIM)]
        requests.append(Request(ascending(n), past, places, q, tensors(GROUPS, n, DIM), tensors(GROUPS, n, VALUE_DIM)))
    sinks = torch.randn(HEADS) if draw(st.booleans()) else None
    return World(records, requests, dtype, draw(st.sampled_from([None, 5.0])), sinks)


def dense(world: World, layer: int) -> list[Tensor]:
    """What every request's new tokens should get in a layer: [H, new tokens, Dv] float64 each."""
    rotary, window = LAYERS[layer]
    results = []
    for one in world.requests:
        keys, values, at, own = [one.k[layer].double()], [one.v[layer].double()], [one.positions], len(one.positions)
        groups = {0: (1.0, 1.0)}
        of = [np.zeros(own)]
        for which, start, lo, hi, group, *weights in one.places:
            record = world.records[which]
            groups[group] = weights
            of.append(np.full(hi - lo, group))
            keys.append(moved(record.keys[layer][:, lo:hi], start, rotary))
            values.append(record.values[layer][:, lo:hi].double())
            at.append(record.positions.numpy()[lo:hi] + start)
        distance = torch.from_numpy(one.positions[one.past :, None] - np.concatenate(at)[None])
        visible = distance > 0
        visible[:, :own] |= distance[:, :own] == 0  # a token sees itself
        if window is not None:
            visible &= distance < window
        k, v = (torch.cat(t, 1).repeat_interleave(HEADS // GROUPS, 0) for t in (keys, values))
        scores = one.q[layer][:, one.past :].double() @ k.transpose(1, 2) * DIM**-0.5
        results.append(grouped_softmax(scores, visible, v, world, torch.from_numpy(np.concatenate(of)), groups))
    return results


def grouped_softmax(scores, visible, values, world: World, group: Tensor, groups) -> Tensor:
    """softmax_of, with each key's group [N], and {group: (temperature, scale)}: a group competes as one key."""
    outs, lses = [], []
    for number, (temperature, scale) in groups.items():
        inside = visible & (group == number)
        out, lse = softmax_of(scores / temperature, inside, values, world.softcap)
        outs.append(out.nan_to_num(0))  # a token that sees nothing of the group
        lses.append(lse * scale)
    if world.sinks is not None:
        outs.append(torch.zeros_like(outs[0]))
        lses.append(world.sinks.double()[:, None].expand_as(lses[0]))
    weights = torch.softmax(torch.stack(lses), 0)
    return (weights[..., None] * torch.stack(outs)).sum(0)


def own_kv(world: World, one: Request) -> RowKV:
    """A request's KV buffer with its past filled in."""
    kv = RowKV(SHAPES, len(one.positions) + 2, world.dtype, torch.device("cpu"))
    for layer in range(len(LAYERS)):
        kv.keys[layer][:, : one.past] = one.k[layer][:, : one.past]
        kv.values[layer][:, : one.past] = one.v[layer][:, : one.past]
    kv.positions[: one.past] = one.positions[: one.past]
    kv.length = one.past
    return kv


def step(world: World, chosen: list[tuple[Request, RowKV, int]], backend: Backend) -> list[list[Tensor]]:
    """One Step over the next `count` tokens of each (request, its KV, count): [layer][row] -> [H, count, Dv]."""
    cuts = [slice(kv.length, kv.length + count) for _, kv, count in chosen]
    rows = []
    for (one, kv, count), cut in zip(chosen, cuts, strict=True):
        views = [View(world.records[which], *view) for which, *view in one.places]
        rows.append(Row([0] * count, one.positions[cut], views, kv))
    run = Step(rows, LAYERS, ROTARIES, torch.device("cpu"))
    run.backend = backend
    results = []
    for layer in range(len(LAYERS)):
        q, k, v = (
            torch.cat([getattr(one, name)[layer][:, cut] for (one, *_), cut in zip(chosen, cuts, strict=True)], 1)
            for name in "qkv"
        )
        out = run(layer, q, k, v, DIM**-0.5, world.softcap, world.sinks)
        results.append(list(out.split([count for *_, count in chosen], 1)))
    for row in run.rows:
        row.commit()
    return results


def together(world: World, backend: Backend) -> list[list[Tensor]]:
    return step(world, [(one, own_kv(world, one), len(one.positions) - one.past) for one in world.requests], backend)


def a_world(seed: int, places: list[tuple], past: int, new: int) -> World:
    """One request over one record of 6 tokens, the float32 plain case."""
    torch.manual_seed(seed)

    def tensors(heads: int, n: int) -> list[Tensor]:
        return [torch.randn(heads, n, DIM) for _ in LAYERS]

    record = Record("0" * 64, tuple(tensors(GROUPS, 6)), tuple(tensors(GROUPS, 6)), torch.arange(6))
    n = past + new
    places = [(*place, 0, 1.0, 1.0) if len(place) == 4 else place for place in places]
    one = Request(np.arange(n), past, places, tensors(HEADS, n), tensors(GROUPS, n), tensors(GROUPS, n))
    return World([record], [one], torch.float32, None, None)


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@given(world=worlds())
@example(world=a_world(0, [], 0, 5))
@example(world=a_world(1, [(0, -6, 0, 6), (0, -6, 0, 6)], 0, 5))  # seen twice: counts twice
@example(world=a_world(2, [(0, 2, 1, 6)], 0, 5))  # partly above the reader
@example(world=a_world(3, [(0, 50, 0, 6)], 0, 5))  # wholly above it
@example(world=a_world(4, [(0, -6, 0, 6)], 4, 1))  # decoding
@example(world=a_world(5, [(0, -6, 0, 6, 1, 0.5, 0.8), (0, -9, 0, 6, 1, 0.5, 0.8), (0, -6, 0, 6)], 2, 3))  # a group
@example(world=a_world(6, [(0, -6, 0, 6, 1, 0.5, 0.8), (0, 50, 0, 6, 2, 2.0, 1.5)], 0, 5))  # one that nobody sees
@settings(max_examples=draws(60), deadline=None)
def test_step_equals_dense(backend: Backend, world: World):
    results = together(world, backend)
    for layer in range(len(LAYERS)):
        for out, expected in zip(results[layer], dense(world, layer), strict=True):
            close(out, expected)


@given(world=worlds(), data=st.data())
@settings(max_examples=draws(40), deadline=None)
def test_batching_and_chunking_change_nothing(world: World, data: st.DataObject):
    packed = together(world, cpu.attend)
    for index, one in enumerate(world.requests):
        new = len(one.positions) - one.past
        cut = data.draw(st.integers(0, new))
        for counts in [(new,), (cut, new - cut)]:
            kv = own_kv(world, one)
            runs = [step(world, [(one, kv, count)], cpu.attend) for count in counts if count]
            for layer in range(len(LAYERS)):
                close(torch.cat([run[layer][0] for run in runs], 1), packed[layer][index])
            assert kv.length == len(one.positions)
            assert np.array_equal(kv.positions[: kv.length], one.positions)


@given(world=worlds())
@settings(max_examples=draws(25), deadline=None)
def test_nothing_stored_is_copied_or_modified(world: World):
    rows = [(one, own_kv(world, one), len(one.positions) - one.past) for one in world.requests]
    stored = [t for r in world.records for t in (*r.keys, *r.values)]
    before = [t.clone() for t in stored]
    storages = {t.untyped_storage().data_ptr() for t in stored}
    storages |= {t.untyped_storage().data_ptr() for _, kv, _ in rows for t in (*kv.keys, *kv.values)}
    parts_seen = []

    def spy(q: Tensor, parts: list[Part], scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        parts_seen.extend(parts)
        return cpu.attend(q, parts, scale, softcap)

    step(world, rows, spy)
    assert parts_seen
    for part in parts_seen:
        assert part.keys.untyped_storage().data_ptr() in storages
        assert part.values.untyped_storage().data_ptr() in storages
    assert all(torch.equal(a, b) for a, b in zip(stored, before, strict=True))
    for one, kv, _ in rows:
        for layer in range(len(LAYERS)):
            assert torch.equal(kv.keys[layer][:, : kv.length], one.k[layer])
            assert torch.equal(kv.values[layer][:, : kv.length], one.v[layer])


def test_rows_that_read_one_record_share_a_part():
    world = a_world(0, [(0, -6, 0, 6)], 2, 1)
    first = world.requests[0]
    others = [[(0, -9, 0, 6, 0, 1.0, 1.0)], [(0, -100, 0, 6, 1, 0.9, 0.8)]]
    world.requests += [Request(first.positions, 2, places, first.q, first.k, first.v) for places in others]
    sizes: list[int] = []

    def spy(q: Tensor, parts: list[Part], scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        sizes.extend(p.columns.stop - p.columns.start for p in parts if p.keys.data_ptr() == record.keys[0].data_ptr())
        return cpu.attend(q, parts, scale, softcap)

    record = world.records[0]
    together(world, spy)
    assert sizes == [3]  # one matmul for three rows that place the record at three positions, one in a group


def test_far_positions_keep_their_precision():
    world = a_world(0, [(0, -100_000, 0, 6), (0, -99_990, 0, 6)], 0, 4)
    results = together(world, cpu.attend)
    for layer in (0, 1):
        close(results[layer][0], dense(world, layer)[0])


def test_a_finished_row_becomes_a_record_without_a_copy():
    kv = RowKV(SHAPES, 3, torch.bfloat16, torch.device("cpu"))
    kv.positions[:] = [0, 1, 4]
    with pytest.raises(ValueError, match="0 of 3 tokens"):
        kv.record("a" * 64)
    kv.length = 3
    record = kv.record("a" * 64)
    assert len(record) == 3 and record.positions.tolist() == [0, 1, 4]
    assert record.nbytes == kv.nbytes == sum(g * 3 * (k + v) * 2 for g, k, v in SHAPES)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(record.keys, kv.keys, strict=True))


def test_naive_rotation_is_rope():
    """The naive side itself: moving a key by 2 then -2 gives it back, and scores depend on distances alone."""
    q, k = torch.randn(1, 1, DIM), torch.randn(1, 1, DIM)
    for rotary in range(len(ROTARIES)):
        close(moved(moved(k, 2, rotary), -2, rotary), k)
        near = (moved(q, 5, rotary) * moved(k, 3, rotary)).sum()
        assert math.isclose(near, (moved(q, 105, rotary) * moved(k, 103, rotary)).sum(), abs_tol=1e-9)


def test_a_record_arrives_on_another_device_in_one_buffer():
    """The meta device stands for a GPU: what matters is where everything lies."""
    shapes, n = [(2, 8, 8), (2, 8, 16)], 5
    kv = RowKV(shapes, n, torch.float32, torch.device("cpu"))
    kv.positions[:], kv.length = np.arange(n), n
    record = kv.record("0" * 64)
    assert on_device(record, torch.device("cpu")) is record
    apart = Record(record.key, tuple(k.clone() for k in record.keys), record.values, record.positions)
    arrived = on_device(apart, torch.device("meta"))
    offsets = [t.storage_offset() for pair in zip(arrived.keys, arrived.values, strict=True) for t in pair]
    assert offsets == [t.storage_offset() for pair in zip(kv.keys, kv.values, strict=True) for t in pair]
    assert [t.shape for t in arrived.keys] == [t.shape for t in record.keys]
