"""A step on an NVIDIA GPU: its bookkeeping as one table of integers, uploaded once and read by every layer's kernels.

A span's KV is one buffer, so one address serves all layers: layer l begins `capacity * prefix(l)` numbers after it.
Nothing here waits for the device. With fixed capacities the same tables serve a captured CUDA graph: its kernels then
read how much there is to do from the device.

Shapes: T tokens, H query heads, G key/value heads, R = H / G, D and Dv head sizes of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvgraph.attention.backends import triton as kernels
from kvgraph.attention.blocks import Fresh, KeyBlock, blocks_of
from kvgraph.attention.rope import Rotary
from kvgraph.attention.rows import Row, RowKV, arrivals_of
from kvgraph.store.record import Arriving, Record

SMALL = 16  # rows of a small tile: blocks that few tokens see
MIN_KEYS = 128  # keys are never split into shorter runs
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tuning(NamedTuple):
    """Sizes of the attention kernel's tiles on one device, for one head size and dtype."""

    rows: int  # of a large tile
    keys: int  # read at a time
    warps: tuple[int, int]  # of small and large tiles
    stages: int  # of the pipeline of loads
    programs: tuple[int, int]  # of small and large tiles, that the device runs at once


def tuning(dim: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    """Tiles that fit the device's shared memory with little register spilling. dim: the larger head size."""
    processors, shared = 4, 99 << 10
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        shared = {(8, 0): 163, (8, 7): 163}.get(torch.cuda.get_device_capability(device), 99) << 10
        if torch.cuda.get_device_capability(device) >= (9, 0):
            shared = 227 << 10 if torch.cuda.get_device_capability(device)[0] in (9, 10) else shared
    if dtype == torch.float32:  # IEEE products run without tensor cores
        return Tuning(64 if dim <= 128 else SMALL, 32 if dim <= 64 else 16, (8, 8), 2, (processors * 2, processors * 2))
    if dim > 128:
        return Tuning(64, 32, (4, 4), 2, (processors * 3, processors * 2))
    stages = 3 if shared > 160 << 10 else 2
    return Tuning(128 if shared > 128 << 10 else 64, 64, (4, 8), stages, (processors * 4, processors * 2))


def merging(tokens: int) -> tuple[int, int]:
    """Partial results that `merge` reads at once, and its warps. A few programs are slow if they read one part after another;
    many programs hide that, and then what a program reads in vain counts."""
    return (64, 4) if tokens <= 64 else (16, 2)


class Sizes(NamedTuple):
    """Capacity of every table, in entries: fixed for a captured graph, otherwise what a step needs."""

    tokens: int
    want: int
    shifts: int
    pairs: int
    blocks: int
    small: int
    large: int
    merged: int
    entries: int
    slots: int
    mask_bytes: int = 0

    def holds(self, other: Sizes) -> bool:
        """Whether a step of the other sizes fits into these."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


def fixed_sizes(tokens: int, most: int) -> Sizes:
    """Capacities of the tables of a captured step of `tokens` tokens; slots are those of the largest step, `most`."""
    return Sizes(
        tokens, tokens, 1024, max(2048, 64 * tokens), max(2048, 64 * tokens), 4096, 4096, tokens, 128 * most, 128 * most
    )


@dataclass
class Window:
    """What the layers of one sliding window (or none) see, as tables; see `kernels.attend` and `kernels.merge`."""

    shifts: np.ndarray  # [S] int64: distinct positions of a seen span's token 0; row 0 is 0
    pairs: np.ndarray  # [P, 3]
    blocks: np.ndarray  # [n, 6]; masks are offsets into mask_bytes + 1, 0: none; address 0: the step's scratch
    leads: np.ndarray  # [T]: row of shifts that moves a new key into the frame of its chain
    small: np.ndarray  # [n, 8]
    large: np.ndarray  # [n, 8]
    merged: np.ndarray  # [n, 3]
    entries: np.ndarray  # [n, 2]
    more: np.ndarray  # [merged, groups] float32
    slots: int
    masks: list[np.ndarray]
    sharp: bool
    work: int  # what its tokens read: keys x tiles x groups
    run: int  # of so many keys is each part of a block that is split

    @property
    def groups(self) -> int:
        return self.more.shape[1]

    @property
    def mask_bytes(self) -> int:
        return sum(m.size + 15 & -16 for m in self.masks)


def address(source: Record | RowKV, numbers: int) -> tuple[int, int]:
    """(address, capacity in tokens) of a source's one buffer, which holds `numbers` keys and values per token.

    Raises ValueError if its KV isn't one buffer.
    """
    first, last = source.keys[0], source.values[-1]
    groups, tokens, dim = first.shape
    capacity = first.stride(0) // dim if groups > 1 else source.capacity if isinstance(source, RowKV) else tokens
    begin = first.data_ptr()
    if begin + capacity * (numbers - last.shape[0] * last.shape[2]) * last.element_size() != last.data_ptr():
        raise ValueError("the KV of a span must be one buffer on the GPU")
    return begin, capacity


def run_length(work: int, tune: Tuning) -> int:
    """Keys of a run, so that the runs of all blocks fill the device. It never falls as the work grows."""
    run = max(MIN_KEYS, -(-work // tune.programs[0]))
    return -(-run // tune.keys) * tune.keys


def tables(
    blocks: Sequence[KeyBlock], leads: np.ndarray, repeat: int, groups: int, numbers: int, tune: Tuning
) -> Window:
    """The tables of the blocks of a step. leads [T]: of each token's row. numbers: keys and values of a token, of all layers."""
    tokens = len(leads)
    work = groups * sum((b.hi - b.lo) * -(-len(b.tokens) * repeat // tune.rows) for b in blocks if not b.causal)
    run = run_length(work, tune)
    splits = [1 if b.causal or b.mask is not None else -(-(b.hi - b.lo) // run) for b in blocks]
    counts = np.zeros(tokens, dtype=np.int64)
    for block, n in zip(blocks, splits, strict=True):
        counts[block.tokens] += n

    token = np.concatenate([b.tokens for b in blocks])
    at, lengths, weights = zip(*(run for b in blocks for run in b.runs), strict=True)
    shifts, segment = np.unique(np.array([0, *at, *-leads], dtype=np.int64), return_inverse=True)
    segment, moves = segment[: -len(leads)], segment[-len(leads) :]
    pairs = np.zeros((len(token), 3), dtype=np.int64)
    pairs[:, 0], pairs[:, 1] = token, np.repeat(segment[1:], lengths)
    sharp = any(w is not None for w in weights)
    group = np.repeat([w[0] if w else 0 for w in weights], lengths) if sharp else np.zeros(len(token), dtype=np.int64)
    scale = np.repeat([w[2] if w else 1.0 for w in weights], lengths)
    if sharp:
        sharpness = np.repeat([1 / w[1] if w else 1.0 for w in weights], lengths).astype(np.float32)
        pairs[:, 2] = sharpness.view(np.int32)

    addresses: dict[int, tuple[int, int]] = {}
    rows_of: list[tuple[int, ...]] = []
    small: list[tuple[int, ...]] = []
    large: list[tuple[int, ...]] = []
    masks: list[np.ndarray] = []
    entry_pair: list[np.ndarray] = []
    entry_slot: list[np.ndarray] = []
    slots = first = mask_at = 0
    for number, (block, parts) in enumerate(zip(blocks, splits, strict=True)):
        n, total = len(block.tokens), block.hi - block.lo
        if isinstance(block.source, Fresh):
            place, layered = (0, tokens), 0
        else:
            if id(block.source) not in addresses:
                addresses[id(block.source)] = address(block.source, numbers)
            place = addresses[id(block.source)]
            layered = place[1]
        mask, length = 0, 0
        if block.mask is not None:
            masks.append(np.ascontiguousarray(block.mask).view(np.uint8))
            mask, length = mask_at + 1, total
            mask_at += block.mask.size + 15 & -16
        rows_of.append((*place, block.lo, mask, length, layered))
        height, tiles = (SMALL, small) if n * repeat <= SMALL else (tune.rows, large)
        direct = parts == 1 and bool((counts[block.tokens] == 1).all())
        for lo in range(0, total, run) if parts > 1 else (0,):
            hi = min(total, lo + run) if parts > 1 else total
            for row in range(0, n * repeat, height):
                end = min(hi, (row + height - 1) // repeat + 1) if block.causal else hi
                tiles.append((number, first, n, row, lo, end, -1 if direct else slots, int(block.causal)))
            if not direct:
                entry_pair.append(np.arange(first, first + n))
                entry_slot.append(np.arange(slots, slots + n))
                slots += n
        first += n

    merged, entries, more = np.zeros((0, 3), np.int64), np.zeros((0, 2), np.int64), np.zeros((0, int(group.max())))
    if entry_pair:
        pair, slot = np.concatenate(entry_pair), np.concatenate(entry_slot)
        order = np.argsort(token[pair], kind="stable")
        pair, slot = pair[order], slot[order]
        who, starts = np.unique(token[pair], return_index=True)
        merged = np.stack([who, starts, np.append(starts[1:], len(pair))], 1)
        entries = np.stack([slot, group[pair]], 1)
        more = np.zeros((len(who), int(group.max())))
        if sharp:
            reader = np.repeat(np.arange(len(who)), np.diff(np.append(starts, len(pair))))
            inside = group[pair] > 0
            more[reader[inside], group[pair][inside] - 1] = scale[pair][inside] - 1

    def table(found: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
        return np.array(found, dtype=np.int64).reshape(-1, width)

    return Window(
        shifts, pairs, table(rows_of, 6), moves, table(small, 8), table(large, 8), merged, entries, more.astype(np.float32),
        slots, masks, sharp, work, run,
    )  # fmt: skip


class Extent(NamedTuple):
    """Where a table lies in the buffer: entries of 8 bytes."""

    at: int
    size: int


class _Layout:
    """Where every table of a step lies in one buffer of int64. What each decode step changes comes first."""

    def __init__(self, sizes: Sizes, windows: int, groups: int):
        self.end = 0
        self.tokens, self.positions = self._take(sizes.tokens), self._take(sizes.tokens)
        self.want, self.rows = self._take(sizes.want), self._take(3 * sizes.tokens)
        small = [self._take(8 * sizes.small) for _ in range(windows)]
        self.windows = [
            {
                "small": small[window],
                "counts": self._take(4),
                "shifts": self._take(sizes.shifts),
                "pairs": self._take(3 * sizes.pairs),
                "blocks": self._take(6 * sizes.blocks),
                "leads": self._take(sizes.tokens),
                "large": self._take(8 * sizes.large),
                "merged": self._take(3 * sizes.merged),
                "entries": self._take(2 * sizes.entries),
                "more": self._take(max(1, sizes.merged * groups)),
                "masks": self._take(-(-sizes.mask_bytes // 8)),
            }
            for window in range(windows)
        ]

    def _take(self, size: int) -> Extent:
        size = max(2, size + 1 & -2)  # 16-byte steps, and never empty
        self.end += size
        return Extent(self.end - size, size)


class Tables:
    """A step's tables: made on the host, then on the device. With `fixed` sizes, at fixed addresses."""

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes,
        windows: Sequence[int | None],
        groups: int,
        scratch: Tensor | None = None,
    ):
        """scratch: for the new keys and values of one layer, in the frames of their chains; None: no row is joined."""
        self.scratch = scratch
        self.device, self.sizes, self.keys = device, sizes, list(windows)
        self.layout = _Layout(sizes, len(windows), groups)
        self.buffer = torch.empty(self.layout.end, dtype=torch.int64, device=device)

    def fill(self, step: CudaStep, staging: Tensor) -> None:
        """Write a step into the staging buffer (pinned) and start its upload."""
        host, rows, want = staging.numpy(), step.rows, step.want
        tokens = [t for row in rows for t in row.tokens]
        self._put(host, self.layout.tokens, np.array(tokens, dtype=np.int64), rest=0)
        self._put(host, self.layout.positions, np.concatenate([row.positions for row in rows]), rest=0)
        self._put(host, self.layout.want, np.array(want, dtype=np.int64), rest=0)
        to = np.zeros((len(tokens), 3), dtype=np.int64)
        at = 0
        for row in rows:
            here = slice(at, at + len(row.tokens))
            to[here, :2] = row.kv.buffer.data_ptr(), row.kv.capacity
            to[here, 2] = np.arange(row.kv.length, row.kv.length + len(row.tokens))
            at = here.stop
        self._put(host, self.layout.rows, to, rest=0)
        for found, where in zip(step.tables, self.layout.windows, strict=True):
            counts = [len(found.small), len(found.large), len(found.merged), 0]
            self._put(host, where["counts"], np.array(counts, dtype=np.int64))
            for name in ("shifts", "pairs", "leads", "small", "large", "merged", "entries"):
                self._put(host, where[name], getattr(found, name))
            blocks = found.blocks.copy()
            base = self.buffer.data_ptr() + 8 * where["masks"].at
            blocks[:, 3] = np.where(blocks[:, 3] > 0, blocks[:, 3] - 1 + base, 0)
            if self.scratch is not None:
                fresh = blocks[:, 0] == 0
                blocks[fresh, 0], blocks[fresh, 1] = self.scratch.data_ptr(), self.sizes.tokens
            self._put(host, where["blocks"], blocks)
            if found.more.size:
                self._put(host, where["more"], found.more.view(np.int32).astype(np.int64))
            at = 8 * where["masks"].at
            for mask in found.masks:
                host.view(np.uint8)[at : at + mask.size] = mask.reshape(-1)
                at += mask.size + 15 & -16
        self.upload(staging, self.layout.end)

    def upload(self, staging: Tensor, end: int) -> None:
        """Start the upload of the first `end` entries of a staging buffer (pinned)."""
        self.buffer[:end].copy_(staging[:end], non_blocking=True)

    @staticmethod
    def _put(host: np.ndarray, section: Extent, values: np.ndarray, rest: int | None = None) -> None:
        host[section.at : section.at + values.size] = values.reshape(-1)
        if rest is not None:
            host[section.at + values.size : section.at + section.size] = rest

    def view(self, section: Extent) -> Tensor:
        """A table on the device, [size] int64."""
        return self.buffer[section.at : section.at + section.size]

    @property
    def tokens(self) -> Tensor:
        return self.view(self.layout.tokens)[: self.sizes.tokens]

    @property
    def positions(self) -> Tensor:
        return self.view(self.layout.positions)[: self.sizes.tokens]

    @property
    def want(self) -> Tensor:
        return self.view(self.layout.want)[: self.sizes.want]


class Flags(NamedTuple):
    """What a step's kernels are compiled for."""

    chained: bool
    masked: bool
    sharp: bool
    groups: int
    large: bool
    merges: bool


class Attention:
    """Attention of a step's layers from its tables; call it as the model's `attend`."""

    def __init__(
        self,
        tables: Tables,
        flags: Flags,
        layers: Sequence[Any],
        rotaries: Sequence[Rotary],
        tune: Tuning,
        partial: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None,
        arrivals: Sequence[Arriving] = (),
    ):
        """partial: scratch memory for partial results, to share it with others of the same sizes. arrivals: each layer waits
        for its own keys and values of these.
        """
        self.tables, self.flags, self.layers, self.rotaries, self.tune = tables, flags, layers, rotaries, tune
        numbers = [layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers]
        self.prefix = [0, *accumulate(numbers)]
        self._angles: dict[tuple[int | None, int], tuple[Tensor, Tensor]] = {}
        self._partial = {} if partial is None else partial
        self._arrivals = arrivals

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of one layer. q [H, T, D], k [G, T, D], v [G, T, Dv], all rotated to row frames -> [H, T, Dv]."""
        heads, tokens, dim = q.shape
        groups, value_dim = k.shape[0], v.shape[-1]
        sizes, tables, tune = self.tables.sizes, self.tables, self.tune
        q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
        block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (dim, value_dim))
        prefix = self.prefix[layer]
        window, rotary = self.layers[layer].window, self.layers[layer].rotary
        rotated = 0 if rotary is None else self.rotaries[rotary].dims
        interleaved = rotary is not None and self.rotaries[rotary].interleaved
        where = tables.layout.windows[tables.keys.index(window)]
        table = {name: tables.view(section) for name, section in where.items()}
        out = torch.empty(tokens, heads, value_dim, dtype=q.dtype, device=q.device)
        cos, sin = self._angle(window, rotary, table["shifts"])
        kernels.write[(tokens, groups)](
            k, v, tables.view(tables.layout.rows), table["leads"], out if tables.scratch is None else tables.scratch,
            cos, sin, prefix, tokens, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            G=groups, D=dim, DV=value_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, KV=_DTYPES[k.dtype], ROTATED=rotated,
            INTERLEAVED=interleaved, CHAINED=self.flags.chained, num_warps=1,
        )  # fmt: skip
        partial, partial_lse = self._room(heads, value_dim, q.device)
        for arrival in self._arrivals:
            arrival.wait(layer)
        kinds = [(0, SMALL, "small", sizes.small)] + [(1, tune.rows, "large", sizes.large)] * self.flags.large
        for which, rows, name, most in kinds:
            if not most:
                continue
            kernels.attend[(min(most * groups, tune.programs[which]),)](
                q, out, partial, partial_lse, table[name], table["counts"], which, table["blocks"], table["pairs"],
                cos, sin, out if sinks is None else sinks, prefix, scale * (1.0 if softcap else kernels.LOG2E),
                softcap or 1.0, q.stride(0), q.stride(1), sizes.slots,
                H=heads, G=groups, D=dim, DV=value_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, ROWS=rows, KEYS=tune.keys,
                KV=_DTYPES[k.dtype], ROTATED=rotated, INTERLEAVED=interleaved, MASKED=self.flags.masked,
                SHARP=self.flags.sharp, SOFTCAP=softcap is not None, SINKS=sinks is not None,
                num_warps=tune.warps[which], num_stages=tune.stages,
            )  # fmt: skip
        if self.flags.merges:
            read, warps = merging(sizes.merged)
            kernels.merge[(sizes.merged, heads)](
                partial, partial_lse, out, table["merged"], table["counts"], table["entries"], table["more"],
                out if sinks is None else sinks, sizes.slots,
                H=heads, DV=value_dim, BLOCK_DV=block_dv, READ=read, GROUPS=self.flags.groups,
                SINKS=sinks is not None, num_warps=warps,
            )  # fmt: skip
        return out.transpose(0, 1)

    def _angle(self, window: int | None, rotary: int | None, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Tables that move a query from its frame into that of a seen span: cos, sin [S, rotated / 2] float32."""
        if rotary is None:
            return self.tables.buffer, self.tables.buffer  # never read
        if (window, rotary) not in self._angles:
            self._angles[window, rotary] = self.rotaries[rotary].table(-shifts[: self.tables.sizes.shifts])
        return self._angles[window, rotary]

    def _room(self, heads: int, value_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Memory for partial results, which the layers use one after the other."""
        if (heads, value_dim) not in self._partial:
            slots = max(1, self.tables.sizes.slots)
            partial = torch.empty(heads, slots, value_dim, dtype=torch.float32, device=device)
            self._partial[heads, value_dim] = partial, torch.empty(heads, slots, dtype=torch.float32, device=device)
        return self._partial[heads, value_dim]


class CudaStep:
    """Bookkeeping of one packed forward on a GPU. `on_device` makes `attention` and the tables on the device."""

    def __init__(
        self,
        rows: Sequence[Row],
        want: Sequence[int],
        layers: Sequence[Any],
        rotaries: Sequence[Rotary],
        device: torch.device,
        heads: int,
    ):
        self.rows, self.want, self.layers, self.rotaries, self.device = rows, want, layers, rotaries, device
        self.arrivals = arrivals_of(rows)
        self.starts = [0, *accumulate(len(row.tokens) for row in rows)]
        self.size = self.starts.pop()
        for row in rows:
            n = row.kv.length
            row.kv.positions[n : n + len(row.tokens)] = row.positions
        self.tune = tuning(max(max(x.key_dim, x.value_dim) for x in layers), rows[0].kv.buffer.dtype, device)
        groups = layers[0].kv_heads
        self.repeat = heads // groups
        self.numbers = sum(x.kv_heads * (x.key_dim + x.value_dim) for x in layers)
        self.windows = list(dict.fromkeys(layer.window for layer in layers))
        self.leads = np.repeat([row.lead for row in rows], [len(row.tokens) for row in rows])
        self.tables = []
        for window in self.windows:
            own, others = blocks_of(rows, self.starts, window)
            self.tables.append(tables([*own, *others], self.leads, self.repeat, groups, self.numbers, self.tune))

    def scratch(self, tokens: int) -> Tensor | None:
        """Room for the new keys and values of one layer, of so many tokens, if some row is joined to a chain."""
        if not self.flags.chained:
            return None
        most = max(x.kv_heads * (x.key_dim + x.value_dim) for x in self.layers)
        return torch.empty(tokens * most, dtype=self.rows[0].kv.buffer.dtype, device=self.device)

    @cached_property
    def sizes(self) -> Sizes:
        """The capacities that this step needs."""

        def most(measure: Callable[[Window], int]) -> int:
            return max(measure(t) for t in self.tables)

        return Sizes(
            self.size, len(self.want), most(lambda t: len(t.shifts)), most(lambda t: len(t.pairs)),
            most(lambda t: len(t.blocks)), most(lambda t: len(t.small)), most(lambda t: len(t.large)),
            most(lambda t: len(t.merged)), most(lambda t: len(t.entries)), most(lambda t: t.slots),
            most(lambda t: t.mask_bytes),
        )  # fmt: skip

    @cached_property
    def flags(self) -> Flags:
        return Flags(
            bool(self.leads.any()), any(t.masks for t in self.tables), any(t.sharp for t in self.tables), max(t.groups for t in self.tables),
            any(len(t.large) for t in self.tables), any(len(t.merged) for t in self.tables),
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Entries of the tables, in int64."""
        return _Layout(self.sizes, len(self.windows), self.flags.groups).end

    def on_device(self, staging: Tensor) -> tuple[Tables, Attention]:
        """The tables on the device, of exactly the needed size, and attention from them. staging: >= `length` int64."""
        made = Tables(self.device, self.sizes, self.windows, self.flags.groups, self.scratch(self.size))
        made.fill(self, staging)
        return made, Attention(made, self.flags, self.layers, self.rotaries, self.tune, arrivals=self.arrivals)
