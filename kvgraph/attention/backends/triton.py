"""Attention over parts on NVIDIA GPUs: all parts of a call in one Triton launch per tile height, so at most two.

Keys and values stay where they are: a table made on the host holds every part's addresses and strides. A program takes
one tile of a part's (column, head of the group) rows, one key/value head and a run of keys, with an online softmax
(FlashAttention, arXiv 2205.14135). When a call has too few tiles to fill the GPU (decoding over long records), tiles
are split over their keys (Flash-Decoding) and a second kernel merges the splits by log-sum-exp.

Scores and sums are float32: KV tiles in bf16 or fp16 are converted on the chip and multiplied as IEEE float32, without
tensor cores. A fast path with `input_precision="tf32"` would round queries and weights to 11 bits (about 1e-3 on a
score), bf16 dots to 8; "tf32x3" would use tensor cores at about float32's accuracy and is untried.
Without a GPU the same code runs in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), on CPU tensors.

Shapes: H query heads, G key/value heads, R = H / G, C query columns, n columns of a part, N keys, D and Dv head sizes
of keys and values; a part's rows are its n * R pairs (column, head of the group), R heads of a column side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvgraph.attention.backends.base import Part

SMALL, LARGE = 16, 64  # rows of a tile: decoding has a few rows a part, prefill many
WARPS = 8  # with fewer, float32 products of these tiles spill registers
MIN_KEYS = 256  # a tile is never split into runs of fewer keys
WAVES = 4  # programs wanted per multiprocessor before splitting stops
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Schedule(NamedTuple):
    """Programs to run, from the parts' shapes alone, so all layers of a step share it. Tables are int64, on device."""

    # (rows a tile, [tiles, 8]: part, causal, first column, n, first row, key lo, key hi, first slot or -1)
    tiles: tuple[tuple[int, Tensor], ...]
    merges: Tensor  # [split tiles, 6]: first column, n, first row, rows a tile, first slot, splits
    slots: int  # rows of partial results


def attend(q: Tensor, parts: Sequence[Part], scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """q [H, C, D] float32 -> out [H, C, Dv], lse [H, C], float32. Keys and values of a call have one dtype.

    Raises ValueError for mixed dtypes, or a last dimension that isn't contiguous.
    """
    heads, columns, dim = q.shape
    groups, value_dim, dtype = parts[0].keys.shape[0], parts[0].values.shape[-1], parts[0].keys.dtype
    q = q if q.stride(2) == 1 else q.contiguous()
    addresses, aligned = _addresses(parts, dtype, q.device)
    shapes = tuple((p.columns.start, p.columns.stop - p.columns.start, p.keys.shape[1], p.causal) for p in parts)
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (dim, value_dim))
    large, keys = _tile_size(max(block_d, block_dv))
    schedule = _schedule(shapes, groups, heads // groups, large, q.device)
    out, lse = q.new_empty(heads, columns, value_dim), q.new_empty(heads, columns)
    partial, partial_lse = q.new_empty(groups, schedule.slots, value_dim), q.new_empty(groups, schedule.slots)
    with torch.cuda.device_of(q):
        for rows, tiles in schedule.tiles:
            _attend[(len(tiles), groups)](
                q, out, lse, partial, partial_lse, addresses, tiles, scale, softcap or 1.0,
                q.stride(0), q.stride(1), columns, schedule.slots,
                R=heads // groups, D=dim, DV=value_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, ROWS=rows, KEYS=keys,
                KV=_DTYPES[dtype], ALIGNED=aligned, MASKED=any(p.mask is not None for p in parts),
                SOFTCAP=softcap is not None, num_warps=WARPS,
            )  # fmt: skip
        if len(schedule.merges):
            _merge[(len(schedule.merges), max(rows for rows, _ in schedule.tiles), groups)](
                out, lse, partial, partial_lse, schedule.merges, columns, schedule.slots,
                R=heads // groups, DV=value_dim, BLOCK_DV=block_dv, SPLITS=16,
            )  # fmt: skip
    return out, lse


def _addresses(parts: Sequence[Part], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
    """The table [parts, 9] of addresses and strides, and elements in 16 bytes (0: some part isn't aligned)."""
    rows = []
    for keys, values, mask in ((p.keys, p.values, p.mask) for p in parts):
        if not keys.dtype == values.dtype == dtype:
            raise ValueError(f"keys and values of a call must share one dtype: {dtype}, {keys.dtype}, {values.dtype}")
        if keys.stride(2) != 1 or values.stride(2) != 1:
            raise ValueError("the last dimension of keys and values must be contiguous")
        seen = (0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())
        rows.append((keys.data_ptr(), values.data_ptr(), *keys.stride()[:2], *values.stride()[:2], *seen))
    table = torch.empty(len(rows), 9, dtype=torch.int64, pin_memory=device.type == "cuda")
    host = table.numpy()
    host[:] = rows
    aligned = not (host[:, :2] % 16).any() and not (host[:, 2:6] * dtype.itemsize % 16).any()
    return table.to(device, non_blocking=True), 16 // dtype.itemsize if aligned else 0


@lru_cache(maxsize=32)
def _schedule(
    shapes: tuple[tuple[int, int, int, bool], ...], groups: int, repeat: int, large: int, device: torch.device
) -> _Schedule:
    """Tiles of parts of (first column, n, N, causal), split over keys until the GPU is full."""
    whole = []
    for part, (first, n, total, causal) in enumerate(shapes):
        height = SMALL if n * repeat <= SMALL else large
        for row in range(0, n * repeat, height):
            hi = min(total, (row + height - 1) // repeat + 1) if causal else total
            whole.append((height, part, causal, first, n, row, hi))
    work = groups * sum(hi for *_, hi in whole)
    run = max(MIN_KEYS, triton.cdiv(work, WAVES * _multiprocessors(device)))
    tiles: dict[int, list[tuple[int, ...]]] = {}
    merges: list[tuple[int, ...]] = []
    slots = 0
    for height, part, causal, first, n, row, hi in whole:
        splits = triton.cdiv(hi, run)
        if splits > 1:
            merges.append((first, n, row, height, slots, splits))
        for lo in range(0, hi, run):
            slot = -1 if splits == 1 else slots
            tiles.setdefault(height, []).append((part, int(causal), first, n, row, lo, min(hi, lo + run), slot))
            slots += height if splits > 1 else 0
    tables = tuple((height, torch.tensor(rows).to(device)) for height, rows in tiles.items())
    return _Schedule(tables, torch.tensor(merges, dtype=torch.int64).to(device), slots)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _tile_size(dim: int) -> tuple[int, int]:
    """(rows, keys) of a large tile for a head size, so that it fits 99 KiB of shared memory and hardly spills."""
    return (LARGE if dim <= 128 else SMALL), (32 if dim <= 64 else 16)


@triton.jit(do_not_specialize=["columns", "slots"])
def _attend(
    q, out, lse, partial, partial_lse, addresses, tiles, scale, softcap,
    q_head, q_column, columns, slots,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    KV: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One tile of rows over keys lo..hi of one key/value head: into out and lse, or a slot of partial results."""
    tile, group = tiles + tl.program_id(0) * 8, tl.program_id(1).to(tl.int64)
    part, causal = tl.load(tile), tl.load(tile + 1)
    first, n, row = tl.load(tile + 2), tl.load(tile + 3).to(tl.int32), tl.load(tile + 4).to(tl.int32)
    lo, hi, slot = tl.load(tile + 5).to(tl.int32), tl.load(tile + 6).to(tl.int32), tl.load(tile + 7)
    a = addresses + part * 9
    k_ptr, v_ptr = tl.load(a).to(tl.pointer_type(KV)), tl.load(a + 1).to(tl.pointer_type(KV))
    k_group, k_key, v_group, v_key = tl.load(a + 2), tl.load(a + 3), tl.load(a + 4), tl.load(a + 5)
    if ALIGNED:  # lets the compiler load 16 bytes at a time
        k_ptr, v_ptr = tl.multiple_of(k_ptr, 16), tl.multiple_of(v_ptr, 16)
        k_group, k_key = tl.multiple_of(k_group, ALIGNED), tl.multiple_of(k_key, ALIGNED)
        v_group, v_key = tl.multiple_of(v_group, ALIGNED), tl.multiple_of(v_key, ALIGNED)

    rows = row + tl.arange(0, ROWS)
    real = rows < n * R
    column, head = rows // R, group * R + rows % R
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = q + head[:, None] * q_head + (first + column)[:, None] * q_column + d[None]
    q_tile = tl.load(q_at, mask=real[:, None] & (d < D)[None], other=0.0)
    last = tl.where(causal != 0, column, hi)  # the last key a row sees

    top = tl.full([ROWS], float("-inf"), tl.float32)  # the highest score so far
    total = tl.zeros([ROWS], tl.float32)  # sum of exp(score - top)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for at in range(lo, hi, KEYS):
        key = at + tl.arange(0, KEYS)
        inside = key < hi
        k_at = k_ptr + group * k_group + key[None] * k_key + d[:, None]
        k = tl.load(k_at, mask=inside[None] & (d < D)[:, None], other=0.0).to(tl.float32)
        scores = tl.dot(q_tile, k, input_precision="ieee") * scale
        if SOFTCAP:
            e = tl.exp(-2.0 * tl.abs(scores) / softcap)
            scores = tl.where(scores < 0, -softcap, softcap) * (1.0 - e) / (1.0 + e)  # softcap * tanh(scores / softcap)
        visible = inside[None] & (key[None] <= last[:, None])
        if MASKED:
            mask = tl.load(a + 6)  # 0: this part has none
            m_at = mask.to(tl.pointer_type(tl.int8)) + column[:, None] * tl.load(a + 7) + key[None] * tl.load(a + 8)
            masked = rows < tl.where(mask != 0, n * R, 0)
            visible &= tl.load(m_at, mask=visible & masked[:, None], other=1) != 0
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing yet
        weights, fade = tl.exp(scores - base[:, None]), tl.exp(top - base)
        v_at = v_ptr + group * v_group + key[:, None] * v_key + dv[None]
        v = tl.load(v_at, mask=inside[:, None] & (dv < DV)[None], other=0.0).to(tl.float32)
        acc = tl.dot(weights, v, acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        top = higher

    some = total > 0
    safe = tl.where(some, total, 1.0)
    result, result_lse = acc / safe[:, None], tl.where(some, top + tl.log(safe), float("-inf"))
    if slot < 0:
        to = head * columns + first + column
        tl.store(out + to[:, None] * DV + dv[None], result, mask=real[:, None] & (dv < DV)[None])
        tl.store(lse + to, result_lse, mask=real)
    else:
        to = group * slots + slot + tl.arange(0, ROWS)
        tl.store(partial + to[:, None] * DV + dv[None], result, mask=real[:, None] & (dv < DV)[None])
        tl.store(partial_lse + to, result_lse, mask=real)


@triton.jit(do_not_specialize=["columns", "slots"])
def _merge(
    out, lse, partial, partial_lse, merges, columns, slots,
    R: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of a split tile: every split weighs exp(its lse - the joint lse). SPLITS of them are read at a time."""
    merge, index, group = merges + tl.program_id(0) * 6, tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, n, row = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2) + index
    height, slot, splits = tl.load(merge + 3), tl.load(merge + 4), tl.load(merge + 5)
    if (index < height) & (row < n * R):
        dv = tl.arange(0, BLOCK_DV)
        top, total = float("-inf"), 0.0
        acc = tl.zeros([BLOCK_DV], tl.float32)
        for at in range(0, splits, SPLITS):
            split = at + tl.arange(0, SPLITS)
            source = group * slots + slot + split * height + index
            lses = tl.load(partial_lse + source, mask=split < splits, other=float("-inf"))
            higher = tl.maximum(top, tl.max(lses, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights, fade = tl.exp(lses - base), tl.exp(top - base)
            there = (split < splits)[:, None] & (dv < DV)[None]
            values = tl.load(partial + source[:, None] * DV + dv[None], mask=there, other=0.0)
            acc = acc * fade + tl.sum(values * weights[:, None], 0)
            total = total * fade + tl.sum(weights, 0)
            top = higher
        to = (group * R + row % R) * columns + first + row // R
        tl.store(out + to * DV + dv, acc / total, mask=dv < DV)
        tl.store(lse + to, top + tl.log(total))
