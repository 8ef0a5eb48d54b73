"""Attention of one layer by several libraries side by side, on the same inputs: a part of `benchmarks.gpu`.

Every row sees a span at another rotation. kvgraph's kernels rotate the queries themselves, attend, merge, and write the new
keys and values. The other libraries are used in three steps: rotate the queries for every span they see (by a Triton kernel
of this file), attend with a sequence for each span (of all tokens that see it) or for each pair of a row and a span, and merge by
log-sum-exp. A row's own new tokens see each other causally: with more than one, that takes a second call.

Each call reads another copy of the KV, as layers do, so that it doesn't come from the L2 cache. Times are by CUDA events; the
device is kept busy until the host has submitted everything, so they are without the host's share, which is given as "host ms".

Shapes: T tokens, H query heads, G key/value heads, D head size, N tokens of a source, P queries that are rotated for a source.
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.common import median
from kvgraph.attention.cuda import SMALL, Attention, CudaStep, Tables, fixed_sizes
from kvgraph.attention.rope import Rotary
from kvgraph.attention.rows import Row, RowKV, View
from kvgraph.engine.runner import GRAPH_TOKENS

PAGE = 16  # tokens of a page
AHEAD = 4_000_000  # clock cycles, about 2 ms, in which the host submits a call
WORKSPACE = 384 << 20  # bytes
TOLERANCE = 0.03  # of the largest value: inputs and partial results are in 16 bits
Figures = dict[str, Any]


class Case(NamedTuple):
    """Rows that all see the same spans, each in another order."""

    rows: int
    tokens: int  # new ones of each row
    past: int  # tokens that each row holds before
    spans: int
    length: int  # tokens of a span


CASES = {
    "decode, 1 row over 32 spans of 1,000": Case(1, 1, 50, 32, 1000),
    "decode, 16 rows over the same 32 spans": Case(16, 1, 50, 32, 1000),
    "question of 50 over 32 spans of 1,000": Case(1, 50, 0, 32, 1000),
    "encode 16 documents of 500": Case(16, 500, 0, 0, 0),
}


class Layer(NamedTuple):
    rotary: int
    window: None
    kv_heads: int
    key_dim: int
    value_dim: int


class Problem:
    """Inputs of a case, random. Sources of KV are the spans, then each row's own; every copy stands for a layer."""

    def __init__(
        self, case: Case, device: torch.device, heads: int = 32, groups: int = 8, dim: int = 128, copies: int = 4,
        dtype: torch.dtype = torch.bfloat16,
    ):  # fmt: skip
        torch.manual_seed(0)
        self.case, self.heads, self.groups, self.dim, self.copies, self.dtype = case, heads, groups, dim, copies, dtype
        self.device, self.tokens, self.scale = device, case.rows * case.tokens, dim**-0.5
        own = case.past + case.tokens
        self.sources = [self._source(case.length, case.length) for _ in range(case.spans)]
        self.sources += [self._source(own, case.past) for _ in range(case.rows)]
        self.q = [self._random(heads) for _ in range(copies)]
        rows = self.sources[case.spans :]
        self.k, self.v = (
            [torch.cat([side(r)[c][:, case.past :] for r in rows], 1) for c in range(copies)]
            for side in (lambda r: r.keys, lambda r: r.values)
        )
        order = (np.arange(case.spans)[None] - np.arange(case.rows)[:, None]) % max(1, case.spans)
        self.at = -case.length * (1 + order)  # [rows, spans]
        self.rotary = Rotary(5e5 ** -(torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim // 2)))

    def _random(self, heads: int) -> Tensor:
        made = torch.randn(self.tokens, heads, self.dim, device=self.device, dtype=torch.float32)
        return made.to(self.dtype).transpose(0, 1)

    def _source(self, capacity: int, filled: int) -> RowKV:
        made = RowKV([(self.groups, self.dim, self.dim)] * self.copies, capacity, self.dtype, self.device)
        made.buffer.copy_(torch.randn(made.buffer.shape, device=self.device))
        made.positions[:], made.length = np.arange(capacity), filled
        return made

    @property
    def kv_bytes(self) -> int:
        """Of one copy, each source once."""
        return sum(s.nbytes for s in self.sources) // self.copies

    @property
    def operations(self) -> int:
        """Of the two products, with what the causal mask hides left out."""
        c = self.case
        seen = c.spans * c.length * c.tokens + c.past * c.tokens + c.tokens * (c.tokens + 1) // 2
        return 4 * self.dim * self.heads * c.rows * seen

    def packed(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every copy, all sources one after the other: each [N, G, D]."""
        found = []
        for c in range(self.copies):
            sides = [s.keys[c] for s in self.sources], [s.values[c] for s in self.sources]
            k, v = (torch.cat([x.transpose(0, 1) for x in side]).contiguous() for side in sides)
            found.append((k, v))
        return found

    def paged(self) -> list[Tensor]:
        """The same in pages that belong to one source each: [pages, 2, PAGE, G, D]."""
        pages = sum(-(-s.capacity // PAGE) for s in self.sources)
        found = []
        for c in range(self.copies):
            made = torch.zeros(pages, 2, PAGE, self.groups, self.dim, dtype=self.dtype, device=self.device)
            for side in (0, 1):
                flat, at = torch.zeros_like(made[:, 0]).flatten(0, 1), 0
                for source in self.sources:
                    x = (source.keys, source.values)[side][c].transpose(0, 1)
                    flat[at : at + len(x)] = x
                    at += -(-len(x) // PAGE) * PAGE
                made[:, side] = flat.unflatten(0, (pages, PAGE))
            found.append(made)
        return found

    def exact(self, token: int) -> Tensor:
        """A token's attention in copy 0, in float32: [H, D]."""
        case, scores, values = self.case, [], []
        row, index = divmod(token, case.tokens)
        spans = [(s, int(self.at[row, i]), case.length) for i, s in enumerate(self.sources[: case.spans])]
        for source, at, n in [*spans, (self.sources[case.spans + row], 0, case.past + index + 1)]:
            moved = self.rotary.rotate(
                self.q[0][:, [token]], *self.rotary.table(torch.tensor([-at], device=self.device))
            )
            q = moved.view(self.groups, -1, self.dim)
            scores.append(q @ source.keys[0][:, :n].float().transpose(1, 2) * self.scale)
            values.append(source.values[0][:, :n].float())
        return (torch.cat(scores, 2).softmax(2) @ torch.cat(values, 1)).view(self.heads, self.dim)


@triton.jit
def turn(q, out, tokens, cos, sin, q_head, q_token, H: tl.constexpr, D: tl.constexpr):
    """Copy query `tokens`[p] of all heads into out [P, H, D], rotated by row p of the tables."""
    pair = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, H), tl.arange(0, D)
    HALF: tl.constexpr = D // 2
    at = q + tl.load(tokens + pair) * q_token + h[:, None].to(tl.int64) * q_head
    x = tl.load(at + d[None]).to(tl.float32)
    y = tl.load(at + tl.where(d < HALF, d + HALF, d - HALF)[None]).to(tl.float32)
    c, s = tl.load(cos + pair * HALF + d % HALF), tl.load(sin + pair * HALF + d % HALF)
    turned = x * c[None] + y * (s * tl.where(d < HALF, -1.0, 1.0))[None]
    tl.store(out + (pair * H + h[:, None]) * D + d[None], turned.to(out.dtype.element_ty))


class Call(NamedTuple):
    """Sequences of queries, each over one source."""

    tokens: list[np.ndarray]
    shifts: list[np.ndarray]  # by how much each query is moved
    sources: list[int]
    causal: bool

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(map(len, self.tokens))]


def calls_of(p: Problem, by_pair: bool) -> list[Call]:
    """What a library with sequences is to compute. by_pair: a sequence for each row and span, otherwise for each span."""
    case = p.case
    row, every = np.repeat(np.arange(case.rows), case.tokens), np.arange(p.tokens)
    mine = [every[row == r] for r in range(case.rows)]
    groups = mine if by_pair else [every]
    own = Call(mine, [t * 0 for t in mine], [case.spans + r for r in range(case.rows)], True)
    one = case.tokens == 1  # sees all of its own row
    sequences: list[tuple[np.ndarray, np.ndarray, int]] = []
    for group in groups:
        sequences += [(group, -p.at[row[group], s], s) for s in range(case.spans)]
        if by_pair and one:
            sequences.append((group, group * 0, case.spans + int(row[group[0]])))
    if one and not by_pair:
        sequences += [(tokens, tokens * 0, source) for tokens, source in zip(own.tokens, own.sources, strict=True)]
    seen = Call([t for t, _, _ in sequences], [x for _, x, _ in sequences], [i for _, _, i in sequences], False)
    return [call for call in ([seen] if one else [seen, own]) if call.tokens]


class Candidate:
    """One way to compute a problem. `steps`, run in order for a copy, leave the result [T, H, D] in `out`."""

    out: Tensor
    steps: dict[str, Callable[[int], None]]
    plan: Callable[[], Any] | None = None  # the bookkeeping on the host that all layers share, repeated


class Ours(Candidate):
    """kvgraph's kernels, with the tables that its engine would use: of a fixed size for steps of few tokens."""

    def __init__(self, p: Problem):
        case, self.p = p.case, p
        layers = [Layer(0, None, p.groups, p.dim, p.dim)] * p.copies
        spans, own = p.sources[: case.spans], p.sources[case.spans :]
        records = [s.record(f"{i:064x}") for i, s in enumerate(spans)]
        self.rows = [
            Row(
                [1] * case.tokens,
                np.arange(case.past, case.past + case.tokens),
                [View(s, int(p.at[r, i]), 0, case.length) for i, s in enumerate(records)],
                kv,
            )
            for r, kv in enumerate(own)
        ]
        self.make = lambda: CudaStep(self.rows, [], layers, [p.rotary], p.device, p.heads)
        step = self.make()
        self.size, sizes, flags = p.tokens, step.sizes, step.flags
        padded = 1 << (p.tokens - 1).bit_length()
        if p.tokens <= GRAPH_TOKENS and fixed_sizes(padded, GRAPH_TOKENS).holds(sizes):
            self.size, sizes = padded, fixed_sizes(padded, GRAPH_TOKENS)
            flags = flags._replace(large=padded * p.heads // p.groups > SMALL, merges=True)
        self.tables = Tables(p.device, sizes, step.windows, flags.groups, step.scratch(self.size))
        self.staging = torch.empty(self.tables.layout.end, dtype=torch.int64, pin_memory=p.device.type == "cuda")
        self.plan()
        self.attention = Attention(self.tables, flags, layers, [p.rotary], step.tune)
        padding = (0, 0, 0, 0, 0, self.size - p.tokens)
        self.inputs = [
            [torch.nn.functional.pad(x.transpose(0, 1), padding).transpose(0, 1) for x in (p.q[c], p.k[c], p.v[c])]
            for c in range(p.copies)
        ]
        self.steps = {"attend": self.attend}

    def plan(self) -> None:
        self.tables.fill(self.make(), self.staging)

    def attend(self, copy: int) -> None:
        q, k, v = self.inputs[copy]
        self.out = self.attention(copy, q, k, v, self.p.scale, None, None).transpose(0, 1)[: self.p.tokens]


class Sequences(Candidate):
    """The three steps of a library with sequences; what is to be done is one or two calls."""

    def __init__(self, p: Problem, by_pair: bool = False):
        self.p, self.calls = p, calls_of(p, by_pair)
        tokens = np.concatenate([t for call in self.calls for t in call.tokens])
        shifts = np.concatenate([s for call in self.calls for s in call.shifts])
        self.ends = [0, *accumulate(call.starts[-1] for call in self.calls)]
        self.index = torch.from_numpy(tokens).to(p.device)
        self.cos, self.sin = p.rotary.table(torch.from_numpy(shifts).to(p.device))
        order = np.argsort(tokens, kind="stable")
        in_place = bool((order == np.arange(len(order))).all())
        self.gather = None if in_place else torch.from_numpy(order).to(p.device)
        self.queries, self.partial = (
            torch.empty(len(tokens), p.heads, p.dim, dtype=p.dtype, device=p.device) for _ in range(2)
        )
        self.lse = torch.empty(len(tokens), p.heads, dtype=torch.float32, device=p.device)
        if p.case.spans:
            self.steps = {"rotate": self.rotate, "attend": self.attend, "merge": self.merge}
        else:
            self.steps = {"attend": self.attend}

    def rotate(self, copy: int) -> None:
        p, q = self.p, self.p.q[copy]
        turn[(len(self.index),)](
            q, self.queries, self.index, self.cos, self.sin, q.stride(0), q.stride(1), H=p.heads, D=p.dim
        )

    def attend(self, copy: int) -> None:
        queries = self.queries if self.p.case.spans else self.p.q[copy].transpose(0, 1)
        for i, (a, b) in enumerate(zip(self.ends, self.ends[1:], strict=False)):
            self.call(i, copy, queries[a:b], self.partial[a:b], self.lse[a:b])
        self.out = self.partial

    def call(self, i: int, copy: int, q: Tensor, out: Tensor, lse: Tensor) -> None:
        """Attention of call i into out and lse."""
        raise NotImplementedError

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """Partial results by token: [T, S, H, D], and their log-sum-exps [T, S, H]."""
        partial, lse = self.partial, self.lse
        if self.gather is not None:
            partial, lse = partial[self.gather], lse[self.gather]
        return partial.unflatten(0, (self.p.tokens, -1)), lse.unflatten(0, (self.p.tokens, -1))

    def merge(self, copy: int) -> None:
        partial, lse = self.side_by_side()
        self.out = (partial * lse.softmax(1)[..., None]).sum(1).to(self.p.dtype)


def lengths(p: Problem, call: Call) -> list[int]:
    return [p.sources[s].capacity for s in call.sources]


def starts(counts: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)


class Torch(Sequences):
    """PyTorch's attention over packed sequences; merged in plain torch, as PyTorch has nothing for it."""

    def __init__(self, p: Problem):
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        super().__init__(p)
        self.varlen, self.kv = varlen_attn, p.packed()
        first = [0, *accumulate(s.capacity for s in p.sources)]
        known = inspect.signature(varlen_attn).parameters
        self.arguments: list[tuple[slice, tuple[Any, ...], Figures]] = []
        for call in self.calls:
            sources, counts, keys = call.sources, list(map(len, call.tokens)), lengths(p, call)
            assert sources == list(range(sources[0], sources[-1] + 1)), "packed keys are in the order of the sequences"
            options: Figures = {"return_aux": AuxRequest(lse=True)}
            if call.causal:
                options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            at = slice(first[sources[0]], first[sources[-1] + 1])
            made = (starts(counts, p.device), starts(keys, p.device), max(counts), max(keys))
            self.arguments.append((at, made, options))

    def call(self, i: int, copy: int, q: Tensor, out: Tensor, lse: Tensor) -> None:
        at, made, options = self.arguments[i]
        k, v = self.kv[copy]
        found, log_sums = self.varlen(q, k[at], v[at], *made, **options)
        log_sums = log_sums.T if len(log_sums) == self.p.heads else log_sums  # documented as [P, H], but it is [H, P]
        if len(self.calls) == 1:
            self.partial, self.lse = found, log_sums
        else:
            out.copy_(found)
            lse.copy_(log_sums)


class Dense(Candidate):
    """PyTorch's scaled_dot_product_attention by cuDNN: for documents of one length without spans."""

    def __init__(self, p: Problem):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self.p, self.kernel, self.backend = p, sdpa_kernel, SDPBackend.CUDNN_ATTENTION
        self.steps = {"attend": self.attend}

    def attend(self, copy: int) -> None:
        p = self.p
        q, k, v = (x[copy].unflatten(1, (p.case.rows, -1)).transpose(0, 1) for x in (p.q, p.k, p.v))
        with self.kernel(self.backend):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        self.out = out.transpose(1, 2).flatten(0, 1)


class FlashInfer(Sequences):
    """FlashInfer's wrappers over pages, or over packed keys if there are no spans; merged by its own kernel."""

    def __init__(self, p: Problem, kind: str):
        """kind: decode (the kernel without tensor cores), fa2, fa3, or persistent (BatchAttention)."""
        import flashinfer

        super().__init__(p, by_pair=kind == "decode")
        self.kind, self.flashinfer = kind, flashinfer
        self.ragged = not p.case.spans and kind in ("fa2", "fa3")
        self.kv: list[Any] = p.packed() if self.ragged else p.paged()
        self.first = [0, *accumulate(-(-s.capacity // PAGE) for s in p.sources)]
        self.wrappers = [self._wrapper() for _ in self.calls]
        self.plans = [self._arguments(call) for call in self.calls]
        self.plan()

    def _wrapper(self) -> Any:
        fi, device = self.flashinfer, self.p.device
        if self.kind == "persistent":
            return fi.BatchAttention(kv_layout="NHD", device=str(device))
        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        if self.kind == "decode":
            return fi.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        if self.ragged:
            return fi.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend=self.kind)
        return fi.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=self.kind)

    def _arguments(self, call: Call) -> tuple[tuple[Any, ...], Figures]:
        """Arguments of the wrapper's `plan`."""
        p, queries, keys = self.p, starts(list(map(len, call.tokens))), lengths(self.p, call)
        types: Figures = {"q_data_type": p.dtype, "kv_data_type": p.dtype}
        if self.ragged:
            return (queries, starts(keys), p.heads, p.groups, p.dim), types | {"causal": call.causal}
        ranges = [np.arange(self.first[s], self.first[s + 1]) for s in call.sources]
        indices = torch.from_numpy(np.concatenate(ranges).astype(np.int32)).to(p.device)
        pages = starts([len(r) for r in ranges])
        last = torch.tensor([(n - 1) % PAGE + 1 for n in keys], dtype=torch.int32)
        if self.kind == "decode":
            return (pages, indices, last, p.heads, p.groups, p.dim, PAGE), types
        if self.kind == "persistent":
            every = torch.tensor(keys, dtype=torch.int32)
            made = (queries, pages, indices, every, p.heads, p.groups, p.dim, p.dim, PAGE)
            return made, types | {"causal": call.causal}
        return (queries, pages, indices, last, p.heads, p.groups, p.dim, PAGE), types | {"causal": call.causal}

    def plan(self) -> None:
        for wrapper, (made, options) in zip(self.wrappers, self.plans, strict=True):
            wrapper.plan(*made, **options)

    def call(self, i: int, copy: int, q: Tensor, out: Tensor, lse: Tensor) -> None:
        kv = self.kv[copy] if self.ragged else (self.kv[copy],)
        options: Figures = {} if self.kind == "persistent" else {"return_lse": True}
        self.wrappers[i].run(q, *kv, out=out, lse=lse, **options)

    def merge(self, copy: int) -> None:
        self.out = self.flashinfer.merge_states(*self.side_by_side())[0]


CANDIDATES: dict[str, tuple[Callable[[Problem], Candidate], Callable[[Case], bool]]] = {  # and for which cases
    "kvgraph": (Ours, lambda case: True),
    "PyTorch varlen_attn": (Torch, lambda case: True),
    "PyTorch SDPA by cuDNN": (Dense, lambda case: not case.spans),
    "FlashInfer prefill, FA2": (lambda p: FlashInfer(p, "fa2"), lambda case: True),
    "FlashInfer prefill, FA3": (lambda p: FlashInfer(p, "fa3"), lambda case: True),
    "FlashInfer decode, by row and span": (lambda p: FlashInfer(p, "decode"), lambda case: case.tokens == 1),
    "FlashInfer BatchAttention": (lambda p: FlashInfer(p, "persistent"), lambda case: True),
}


def error(p: Problem, candidate: Candidate) -> float:
    """Largest difference from float32 over a few tokens of copy 0, relative to the largest value."""
    for step in candidate.steps.values():
        step(0)
    some = sorted({0, p.case.tokens // 2, p.tokens // 2, p.tokens - 1})
    exact = torch.stack([p.exact(t) for t in some])
    return float((candidate.out[some].float() - exact).abs().max() / exact.abs().max())


def times(run: Callable[[int], Any], copies: int, repeats: int) -> tuple[float, float]:
    """Median milliseconds of `run`(copy) on the device, and of the host to submit it."""
    device, host = [], []
    for i in range(repeats + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        begin.record()
        started = time.perf_counter()
        run(i % copies)
        host.append((time.perf_counter() - started) * 1e3)
        end.record()
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end))
    return median(device[5:]), median(host[5:])


def measure(p: Problem, make: Callable[[Problem], Candidate], repeats: int) -> Figures:
    """A candidate's figures for a problem."""
    started = time.perf_counter()
    candidate = make(p)
    off = error(p, candidate)
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    ms, host = times(lambda copy: [step(copy) for step in candidate.steps.values()], p.copies, repeats)
    found: Figures = {"ms": ms, "host ms": host}
    if len(candidate.steps) > 1:
        found |= {f"{name} ms": times(step, p.copies, repeats)[0] for name, step in candidate.steps.items()}
    if candidate.plan is not None:
        spent = []
        for _ in range(7):
            begin = time.perf_counter()
            candidate.plan()
            torch.cuda.synchronize()
            spent.append((time.perf_counter() - begin) * 1e3)
        found["plan ms"] = median(spent)
    found |= {"relative error": off, "right": off < TOLERANCE, "first call, with compilation s": first}
    return found


def compare(matrix: float, copy: float, repeats: int = 30) -> Figures:
    """All candidates in all cases. matrix, copy: the card's rates, in operations/s and bytes/s (read + written)."""
    found: Figures = {}
    try:
        found["FlashInfer"] = version("flashinfer-python")
    except ModuleNotFoundError:
        found["FlashInfer"] = "not installed"
    for who, (
        make,
        fits,
    ) in CANDIDATES.items():  # in this order: if one breaks the device's context, the others are done
        for name, case in CASES.items():
            if not fits(case):
                continue
            p = Problem(case, torch.device("cuda"))
            limits = {"bytes limit ms": p.kv_bytes / copy * 1e3, "operations limit ms": p.operations / matrix * 1e3}
            try:
                with torch.no_grad():
                    figures = measure(p, make, repeats)
            except Exception as problem:
                traceback.print_exc()
                figures = {"failed": " ".join(f"{type(problem).__name__}: {problem}".split())[:300]}
            found.setdefault(name, limits)[who] = figures
            print(f"{name}: {who}: {figures}", flush=True)
            torch.cuda.empty_cache()
    return found
