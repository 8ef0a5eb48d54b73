"""A packed sequence through a model, to be backpropagated through: every layer's attention, the logits, and the loss.

Attention is PyTorch's: SDPA with an explicit mask, or FlexAttention with a block mask, which skips what nobody sees.
With sinks it is spelled out, as is softcapping without FlexAttention. Attention dropout isn't applied.
Shapes: H query heads, G key/value heads, D, Dv head sizes, V vocabulary; T, N as in kvgraph.train.pack.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from kvgraph.models import Attend, Trainable
from kvgraph.train.pack import Packed


def logits(
    model: Trainable, packed: Packed, *, module: Callable[..., Any] | None = None, flex: bool | None = None
) -> Tensor:
    """Logits [N, V] float32 of packed.rows; `packed` lies on the model's device.

    module: what to call instead of model.hf where something wraps it. flex: use FlexAttention; unless given, on GPUs
    alone (on the CPU it has no backward pass). There it is compiled for every T anew, so use `Packed.padded`.
    """
    flex = packed.tokens.is_cuda if flex is None else flex
    return model.forward(packed.tokens, packed.positions, _attention(model, packed, flex), packed.rows, module)


def loss(
    logits: Tensor, packed: Packed, *, document_weight: float = 0.0, totals: tuple[int, int] | None = None
) -> Tensor:
    """Mean cross-entropy of the answers' tokens + document_weight * that of the documents' tokens.

    logits [N, V]: of packed.rows. totals: what to divide the sums by, the numbers of answer and document tokens of a
    whole optimizer step (sums of `Packed.counts`), so that the losses of its sequences add up; unless given, this one's.
    """
    answers, documents = totals or packed.counts
    each = cross_entropy(logits, packed.targets, reduction="none")
    weights = torch.where(packed.documents, document_weight / max(documents, 1), 1 / max(answers, 1))
    return (each * weights).sum()


def _attention(model: Trainable, packed: Packed, flex: bool) -> Attend:
    """Every layer's attention; masks are made once for all layers of a window."""
    length, device = len(packed), packed.tokens.device

    @cache
    def mask(window: int | None, dtype: torch.dtype) -> Tensor:  # float, as kernels want it in the end
        hidden = ~packed.visible(window)
        return torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)

    @cache
    def blocks(window: int | None) -> BlockMask:
        return create_block_mask(
            packed.mask_mod(window), None, None, length, length, device, _compile=device.type == "cuda"
        )

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        window = model.layers[layer].window
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, rotation leaves them in float32
        if flex and sinks is None:
            return _flex(q, k, v, blocks(window), scale, softcap)
        if softcap is None and sinks is None:
            attended = scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask(window, q.dtype), scale=scale, enable_gqa=True
            )
            return attended[0]
        return _spelled_out(q, k, v, mask(window, torch.float32), scale, softcap, sinks)

    return attend


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, scale: float, softcap: float | None) -> Tensor:
    """q [H, T, D], k [G, T, D], v [G, T, Dv] -> [H, T, Dv]."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    kernel = _compiled() if q.is_cuda else flex_attention
    score_mod = None if softcap is None else capped
    return kernel(q[None], k[None], v[None], score_mod, blocks, scale, enable_gqa=True)[0]


def _spelled_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The same by the definition, in float32. mask [T, T] float32, sinks [H]: a score that takes weight and gives nothing."""
    dtype, (heads, length, _) = q.dtype, q.shape
    q, k, v = q.float(), *(t.float().repeat_interleave(heads // t.shape[0], 0) for t in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, length, 1)], -1)
    return (torch.softmax(scores, -1)[..., :length] @ v).to(dtype)
