"""Attention of a step on NVIDIA GPUs: Triton kernels that read stored keys and values in place.

A step's bookkeeping is a few tables of integers (see `kvgraph.attention.cuda`), uploaded once and shared by all layers.
A layer runs in three kernels:

- `write` puts the new keys and values into their rows' own KV.
- `attend` runs tiles of (token, head) rows over runs of keys. It rotates each query to the position at which the token
  sees the span, in float32. Products run in the dtype of the keys, on tensor cores for 16 bits, and are summed in
  float32. A tile gives its final result or one of several partial results.
- `merge` merges partial results by log-sum-exp and applies the joint weight of groups of places.

Without a GPU the same code runs in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), on CPU tensors.

Shapes: T tokens, H query heads, G key/value heads, R = H / G, D and Dv head sizes of keys and values, P pairs (a token
and a block of keys that it sees), S slots of partial results. A tile's rows are pairs x R, the R heads side by side.
Log-sum-exps are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634  # log2(e)


@triton.jit
def _turn(x, partner, cos, sin, row, inside, D: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotate x [BLOCK_D] of one head by a row of the tables; partner: x with the two numbers of each pair exchanged."""
    HALF: tl.constexpr = ROTATED // 2
    d = tl.arange(0, x.shape[0])
    angle = d // 2 if INTERLEAVED else d % HALF
    first = (d % 2 == 0) if INTERLEAVED else (d < HALF)
    turned = inside & (d < ROTATED)
    c, s = (
        tl.load(cos + row * HALF + angle, mask=turned, other=1.0),
        tl.load(sin + row * HALF + angle, mask=turned, other=0.0),
    )
    return x * c + partner * s * tl.where(first, -1.0, 1.0)


@triton.jit(do_not_specialize=["prefix", "tokens"])
def write(
    k, v, rows, leads, scratch, cos, sin, prefix, tokens, k_head, k_token, v_head, v_token,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, KV: tl.constexpr,
    ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Copy one token's keys and values of one head to where its row keeps them. rows [T, 3]: address, capacity, index.

    CHAINED: also into scratch (keys [G, T, D], then values [G, T, Dv]), keys rotated into the frame of the chain's first
    row, by row leads[t] of the tables.
    """
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    base, capacity, index = tl.load(rows + token * 3), tl.load(rows + token * 3 + 1), tl.load(rows + token * 3 + 2)
    if base != 0:  # padding tokens of a fixed size have no row
        to = base.to(tl.pointer_type(KV)) + capacity * prefix
        d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        new_k = tl.load(k + group * k_head + token * k_token + d, mask=d < D)
        tl.store(to + (group * capacity + index) * D + d, new_k, mask=d < D)
        new_v = tl.load(v + group * v_head + token * v_token + dv, mask=dv < DV)
        tl.store(to + capacity * G * D + (group * capacity + index) * DV + dv, new_v, mask=dv < DV)
        if CHAINED:
            if ROTATED > 0:
                other = d ^ 1 if INTERLEAVED else tl.where(d < ROTATED // 2, d + ROTATED // 2, d - ROTATED // 2)
                partner = tl.load(k + group * k_head + token * k_token + other, mask=d < ROTATED, other=0.0).to(
                    tl.float32
                )
                row = tl.load(leads + token)
                new_k = _turn(new_k.to(tl.float32), partner, cos, sin, row, d >= 0, D, ROTATED, INTERLEAVED).to(KV)
            tl.store(scratch + (group * tokens + token) * D + d, new_k, mask=d < D)
            tl.store(scratch + G * D * tokens + (group * tokens + token) * DV + dv, new_v, mask=dv < DV)


@triton.jit
def _over_keys(
    top, total, acc, q_tile, k_ptr, v_ptr, start, end, hi, last, scale, softcap, mask, mask_row, row_real,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, KEYS: tl.constexpr,
    BOUND: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online softmax of a tile over keys start..end. BOUND: some row doesn't see all of them."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for at in range(start, end, KEYS):
        key = at + tl.arange(0, KEYS)
        k_at = k_ptr + key[None].to(tl.int64) * D + d[:, None]
        v_at = v_ptr + key[:, None].to(tl.int64) * DV + dv[None]
        if BOUND:
            inside = key < hi
            k = tl.load(k_at, mask=inside[None] & (d < D)[:, None], other=0.0)
            v = tl.load(v_at, mask=inside[:, None] & (dv < DV)[None], other=0.0)
        elif (BLOCK_D == D) & (BLOCK_DV == DV):
            k, v = tl.load(k_at), tl.load(v_at)
        else:
            k = tl.load(k_at, mask=(d < D)[:, None] & (key >= 0)[None], other=0.0)
            v = tl.load(v_at, mask=(dv < DV)[None] & (key >= 0)[:, None], other=0.0)
        scores = tl.dot(q_tile, k, input_precision="ieee") * scale
        if SOFTCAP:
            e = tl.exp(-2.0 * tl.abs(scores) / softcap)
            scores = tl.where(scores < 0, -softcap, softcap) * (1.0 - e) / (1.0 + e)  # softcap * tanh(scores / softcap)
            scores = scores * 1.4426950408889634
        if BOUND:
            visible = inside[None] & (key[None] <= last[:, None])
            if MASKED:
                m_at = mask.to(tl.pointer_type(tl.int8)) + mask_row[:, None] + key[None]
                has = row_real & (mask != 0)
                visible &= tl.load(m_at, mask=visible & has[:, None], other=1) != 0
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        else:
            higher = tl.maximum(top, tl.max(scores, 1))
            base = higher
        weights, fade = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        top = higher
    return top, total, acc


@triton.jit(do_not_specialize=["prefix", "slots", "which"])
def attend(
    q, out, partial, partial_lse, tiles, counts, which, blocks, pairs, cos, sin, sinks, prefix, scale, softcap,
    q_head, q_token, slots,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, KV: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr, SHARP: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Tiles of one height, one program per tile and key/value head. Programs loop over tiles counted on the device.

    tiles [n, 8]: block, first pair, pairs of the block, first row, key lo, key hi, first slot (-1: into out), causal.
    blocks [n, 6]: address and capacity of the KV, first key, address of a mask (0: none) and its row length, and the
    capacity once more if the KV is of all layers (0: of this one, see `write`).
    pairs [P, 3]: token, row of the cos and sin tables, bits of a float32 that multiplies the query.
    """
    R: tl.constexpr = H // G
    HALF: tl.constexpr = ROTATED // 2
    items = tl.load(counts + which) * G
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, group = tiles + (item // G) * 8, item % G
        block = blocks + tl.load(tile) * 6
        first, n, row = tl.load(tile + 1), tl.load(tile + 2).to(tl.int32), tl.load(tile + 3).to(tl.int32)
        lo, hi = tl.load(tile + 4).to(tl.int32), tl.load(tile + 5).to(tl.int32)
        slot, causal = tl.load(tile + 6), tl.load(tile + 7)
        capacity, mask, mask_length = tl.load(block + 1), tl.load(block + 3), tl.load(block + 4)
        kv = tl.load(block).to(tl.pointer_type(KV)) + tl.load(block + 5) * prefix
        k_ptr = kv + (group * capacity + tl.load(block + 2)) * D
        v_ptr = kv + capacity * G * D + (group * capacity + tl.load(block + 2)) * DV
        k_ptr, v_ptr = tl.multiple_of(k_ptr, 16), tl.multiple_of(v_ptr, 16)

        rows = row + tl.arange(0, ROWS)
        real = rows < n * R
        column = rows // R
        head = group * R + rows % R
        pair = pairs + (first + column) * 3
        token = tl.load(pair, mask=real, other=0)
        q_at = q + head.to(tl.int64) * q_head + token * q_token
        x = tl.load(q_at[:, None] + d[None], mask=real[:, None] & (d < D)[None], other=0.0).to(tl.float32)
        if ROTATED > 0:
            if INTERLEAVED:
                partner, angle, sign = d ^ 1, d // 2, tl.where(d % 2 == 0, -1.0, 1.0)
            else:
                partner, angle = tl.where(d < HALF, d + HALF, d - HALF), d % HALF
                sign = tl.where(d < HALF, -1.0, 1.0)
            turned = real[:, None] & (d < ROTATED)[None]
            y = tl.load(q_at[:, None] + partner[None], mask=turned, other=0.0).to(tl.float32)
            at = tl.load(pair + 1, mask=real, other=0)[:, None] * HALF + angle[None]
            x = x * tl.load(cos + at, mask=turned, other=1.0) + y * sign[None] * tl.load(
                sin + at, mask=turned, other=0.0
            )
        if SHARP:
            x = x * tl.load(pair + 2, mask=real, other=0).to(tl.int32).to(tl.float32, bitcast=True)[:, None]
        q_tile = x.to(KV)

        last = tl.where(causal != 0, column, hi)  # the last key a row sees
        open_hi = tl.minimum(hi, tl.where(causal != 0, row // R + 1, hi))  # keys before it are seen by every row
        if MASKED:
            open_hi = tl.where(mask != 0, lo, open_hi)
        middle = lo + tl.maximum(open_hi - lo, 0) // KEYS * KEYS
        mask_row = column.to(tl.int64) * mask_length
        top = tl.full([ROWS], float("-inf"), tl.float32)  # the highest score so far
        total = tl.zeros([ROWS], tl.float32)  # sum of 2 ** (score - top)
        acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        top, total, acc = _over_keys(
            top, total, acc, q_tile, k_ptr, v_ptr, lo, middle, hi, last, scale, softcap, mask, mask_row, real,
            D, DV, BLOCK_D, BLOCK_DV, KEYS, False, False, SOFTCAP,
        )  # fmt: skip
        top, total, acc = _over_keys(
            top, total, acc, q_tile, k_ptr, v_ptr, middle, hi, hi, last, scale, softcap, mask, mask_row, real,
            D, DV, BLOCK_D, BLOCK_DV, KEYS, True, MASKED, SOFTCAP,
        )  # fmt: skip
        some = total > 0
        safe = tl.where(some, total, 1.0)
        result, lse = acc / safe[:, None], tl.where(some, top + tl.log2(safe), float("-inf"))
        stored = real[:, None] & (dv < DV)[None]
        if slot < 0:
            if SINKS:
                sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
                result = result / (1.0 + tl.exp2(sink - lse))[:, None]
            to = (token * H + head) * DV
            tl.store(out + to[:, None] + dv[None], result.to(out.dtype.element_ty), mask=stored)
        else:
            to = head.to(tl.int64) * slots + slot + column
            tl.store(partial + to[:, None] * DV + dv[None], result, mask=stored)
            tl.store(partial_lse + to, lse, mask=real)


@triton.jit(do_not_specialize=["slots"])
def merge(
    partial, partial_lse, out, tokens, counts, entries, more, sinks, slots,
    H: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, READ: tl.constexpr, GROUPS: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """One head of one token with several partial results: each weighs 2 ** (its lse - the joint lse).

    tokens [n, 3]: token, first entry, end of its entries. entries [m, 2]: slot, group (0: none). more [n, GROUPS]: bits
    of the float32 scale - 1 of each group; scale - 1 times the group's joint lse is added to the lse of its entries.
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if index < tl.load(counts + 2):
        token, start, end = (
            tl.load(tokens + index * 3),
            tl.load(tokens + index * 3 + 1),
            tl.load(tokens + index * 3 + 2),
        )
        dv = tl.arange(0, BLOCK_DV)
        top = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([BLOCK_DV], tl.float32)
        for group in tl.static_range(0, GROUPS + 1):
            added = tl.zeros([1], tl.float32)
            if group > 0:
                joint_top = tl.full([1], float("-inf"), tl.float32)
                joint = tl.zeros([1], tl.float32)
                for at in range(start, end, READ):
                    entry = at + tl.arange(0, READ)
                    mine = entry < end
                    mine &= tl.load(entries + entry * 2 + 1, mask=mine, other=-1) == group
                    source = head * slots + tl.load(entries + entry * 2, mask=mine, other=0)
                    lses = tl.load(partial_lse + source, mask=mine, other=float("-inf"))
                    higher = tl.maximum(joint_top, tl.max(lses, 0))
                    base = tl.where(higher == float("-inf"), 0.0, higher)
                    joint = joint * tl.exp2(joint_top - base) + tl.sum(tl.exp2(lses - base), 0)
                    joint_top = higher
                scale = tl.load(more + index * GROUPS + group - 1).to(tl.int32).to(tl.float32, bitcast=True)
                whole = joint_top + tl.log2(tl.where(joint > 0, joint, 1.0))
                added = tl.where(joint > 0, scale * whole, 0.0)
            for at in range(start, end, READ):
                entry = at + tl.arange(0, READ)
                mine = entry < end
                if GROUPS > 0:
                    mine &= tl.load(entries + entry * 2 + 1, mask=mine, other=-1) == group
                source = head * slots + tl.load(entries + entry * 2, mask=mine, other=0)
                lses = tl.load(partial_lse + source, mask=mine, other=float("-inf")) + added
                higher = tl.maximum(top, tl.max(lses, 0))
                base = tl.where(higher == float("-inf"), 0.0, higher)
                weights, fade = tl.exp2(lses - base), tl.exp2(top - base)
                there = mine[:, None] & (dv < DV)[None]
                values = tl.load(partial + source[:, None] * DV + dv[None], mask=there, other=0.0)
                acc = acc * fade + tl.sum(values * weights[:, None], 0)
                total = total * fade + tl.sum(weights, 0)
                top = higher
        if SINKS:
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            total += tl.exp2(sink - top)
        to = out + (token * H + head) * DV
        tl.store(to + dv, (acc / total).to(out.dtype.element_ty), mask=dv < DV)
