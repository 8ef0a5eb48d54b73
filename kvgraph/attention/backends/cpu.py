"""Attention over parts on the CPU: PyTorch's fused kernel, which tiles the scores and returns the log-sum-exp.

If Numba is installed, parts of bfloat16 KV are for `kvgraph.attention.backends.halves` where the processor multiplies bfloat16, and
others of few columns for `kvgraph.attention.backends.compiled`. Both unpack a part of one layer at a time. Softcap, and what
is left with head sizes that differ between keys and values, use the reference backend. Otherwise, KV in bf16 or fp16 and packed KV (see
`kvgraph.store.record.PackedSide`) become float32 tile by tile, so that scores and sums are float32 and memory stays bounded.
Tiles are the same for all kinds of KV, and so are the results.
Shapes: H query heads, G key/value heads, R = H / G, C query columns, n columns of a part, N keys, D head size.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Sequence
from itertools import compress
from types import ModuleType

import torch
from torch import Tensor

from kvgraph.attention.backends import reference
from kvgraph.attention.backends.base import Part
from kvgraph.store.record import Side

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
TILE = 2048  # keys attended to at a time
FEW = 12  # columns x R of a part that the compiled kernel takes, at most: with more, PyTorch's products are faster
COMPILED = (torch.float32, torch.bfloat16)  # what that kernel reads


@functools.cache
def compiled() -> ModuleType | None:
    """The module of that name, imported when it is first needed; None without Numba."""
    try:
        return importlib.import_module("kvgraph.attention.backends.compiled")
    except ImportError:
        return None


@functools.cache
def halves() -> ModuleType | None:
    """The module of that name; None where Numba's code can't have the instruction that multiplies bfloat16."""
    if compiled() is None:
        return None
    numba, codegen = importlib.import_module("numba"), importlib.import_module("numba.core.codegen")
    told = numba.config.CPU_NAME or numba.config.CPU_FEATURES  # to make code for another processor than this
    if told or "+avx512bf16" not in codegen.get_host_cpu_features().split(","):
        return None
    return importlib.import_module("kvgraph.attention.backends.halves")


def warm(dtype: torch.dtype) -> None:
    """Load the compiled kernels for KV of a dtype, or compile them where that never happened, so that the first question
    needn't wait."""
    q, kv = torch.zeros(1, FEW + 2, 2, dtype=torch.float32), torch.zeros(1, 1, 2, dtype=dtype)
    attend(q, [Part(slice(0, 1), kv, kv), Part(slice(1, FEW + 2), kv, kv)], 1.0)


def attend(q: Tensor, parts: Sequence[Part], scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """q [H, C, D] float32 -> out [H, C, Dv], lse [H, C], float32."""
    heads, columns, dim = q.shape
    out = q.new_empty(heads, columns, parts[0].values.shape[-1])
    lse = q.new_empty(heads, columns)
    if softcap is None and not dim % 2 and (sixteen := halves()) is not None:
        half = [part.values.dtype == torch.bfloat16 for part in parts]  # a chain's new keys are float32
        if any(half):
            sixteen.attend(q, list(compress(parts, half)), scale, out, lse)
            parts = list(compress(parts, map(operator.not_, half)))
    few = [softcap is None and _few(part, heads) for part in parts]
    if any(few) and (module := compiled()) is not None:
        module.attend(q, list(compress(parts, few)), scale, out, lse)
        parts = list(compress(parts, map(operator.not_, few)))
    for part in parts:
        here = part.columns
        if softcap is not None or part.values.shape[-1] != dim:
            local = part._replace(columns=slice(0, here.stop - here.start))
            out[:, here], lse[:, here] = reference.attend(q[:, here], [local], scale, softcap)
        elif part.mask is not None:
            out[:, here], lse[:, here] = _masked(q[:, here], part, part.mask, scale)
        elif part.causal:
            out[:, here], lse[:, here] = _causal(q[:, here], part.keys, part.values, scale)
        else:
            out[:, here], lse[:, here] = _open(q[:, here], part.keys, part.values, scale)
    return out, lse


def _few(part: Part, heads: int) -> bool:
    """Whether a part is one for the compiled kernel."""
    rows = (part.columns.stop - part.columns.start) * heads // part.keys.shape[0]
    whole = part.mask is None and (not part.causal or part.keys.shape[1] == 1)
    return rows <= FEW and whole and part.keys.dtype in COMPILED


def _open(q: Tensor, keys: Side, values: Side, scale: float) -> tuple[Tensor, Tensor]:
    """Every column sees every key. The R heads of a group become rows of one matmul, so keys are read once."""
    (heads, n, dim), groups = q.shape, keys.shape[0]
    rows = q.reshape(1, groups, heads // groups * n, dim)
    if keys.shape[1] <= TILE:  # as in nearly all calls of a decoding step, which has hundreds of them
        out, lse = _flash(rows, keys.float()[None], values.float()[None], 0.0, False, attn_mask=None, scale=scale)
        return out.reshape(heads, n, dim), lse.reshape(heads, n)
    outs, lses = [], []
    for at in range(0, keys.shape[1], TILE):
        k, v = keys[:, at : at + TILE].float(), values[:, at : at + TILE].float()
        out, lse = _flash(rows, k[None], v[None], 0.0, False, attn_mask=None, scale=scale)
        outs.append(out.reshape(heads, n, dim))
        lses.append(lse.reshape(heads, n))
    stacked = torch.stack(lses)
    total = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - total)[..., None]
    return (torch.stack(outs) * weights).sum(0), total


def _masked(q: Tensor, part: Part, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Column i sees the keys of mask[i]. The kernel takes the mask as numbers to add to the scores, by tiles."""
    (heads, n, dim), groups = q.shape, part.keys.shape[0]
    repeat = heads // groups
    k, v = part.keys.float()[None], part.values.float()[None]
    step = max(1, reference.TILE // (repeat * mask.shape[1]))
    outs, lses = [], []
    for at in range(0, n, step):
        here = q[:, at : at + step]
        rows = here.reshape(1, groups, -1, dim)
        bias = torch.zeros(here.shape[1], mask.shape[1]).masked_fill_(~mask[at : at + step], -torch.inf)
        out, lse = _flash(rows, k, v, 0.0, False, attn_mask=bias.repeat(repeat, 1)[None, None], scale=scale)
        outs.append(out.reshape(heads, -1, dim))
        lses.append(lse.reshape(heads, -1))
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _causal(q: Tensor, keys: Side, values: Side, scale: float) -> tuple[Tensor, Tensor]:
    """Column i sees keys 0..i. The kernel skips the upper triangle. The R heads of a group become its batch."""
    (heads, n, dim), groups = q.shape, keys.shape[0]
    repeat = heads // groups
    rows = q.reshape(groups, repeat, n, dim).transpose(0, 1)
    k = keys.float()[None].expand(repeat, -1, -1, -1)
    v = values.float()[None].expand(repeat, -1, -1, -1)
    out, lse = _flash(rows, k, v, 0.0, True, attn_mask=None, scale=scale)
    return out.transpose(0, 1).reshape(heads, n, dim), lse.transpose(0, 1).reshape(heads, n)
