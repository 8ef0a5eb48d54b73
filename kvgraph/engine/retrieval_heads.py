"""How well every attention head retrieves, measured once per model: for selections that let some heads decide.

CompressKV (arXiv 2508.02401) hides a sentence in a long text, lets the model answer from it, and adds up how much of its
attention each head gives to the whole sentence while the answer's tokens are produced. Unlike with earlier retrieval scores (arXiv
2404.15574), a head need not look at the very token that is copied. Here the text is random tokens, and the answer is the needle
repeated, given rather than generated. That takes no tokenizer, no data and two short forwards, and works for every model. Heads
that retrieve by meaning alone, not by repetition, are missed; the paper's own measurement would find them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvgraph.attention.rows import Row, RowKV
from kvgraph.attention.step import Step
from kvgraph.models import Model
from kvgraph.store.selection.base import observed

LENGTH, NEEDLE = 256, 24  # tokens of the text, and of the needle in it
DEPTHS = (0.3, 0.7)  # where it stands


@torch.inference_mode()
def retrieval_scores(model: Model) -> list[list[float]]:
    """For every layer and head, the share of its attention that goes to the needle while that is repeated: 0 to 1."""
    found = torch.stack([_scores(model, depth, seed) for seed, depth in enumerate(DEPTHS)])
    return [[float(x) for x in layer] for layer in found.mean(0)]


def needle_text(vocab: int, depth: float, seed: int) -> tuple[list[int], int]:
    """Tokens of a text that ends with its needle repeated, and where the needle begins."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (LENGTH,), generator=draw).tolist()
    begin = int(LENGTH * depth)
    return [*tokens, *tokens[begin : begin + NEEDLE]], begin


def _scores(model: Model, depth: float, seed: int) -> Tensor:
    tokens, begin = needle_text(model.vocab_size, depth, seed)
    shapes = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in model.layers]
    row = Row(tokens, np.arange(len(tokens)), (), RowKV(shapes, len(tokens), model.dtype, model.device))
    step = Step([row], model.layers, model.rotaries, model.device)
    scores: dict[int, Tensor] = {}

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        weights = observed(k, q[:, -NEEDLE:].float() * scale)
        scores[layer] = weights[:, :, begin : begin + NEEDLE].sum(2).mean(1)
        return step(layer, q, k, v, scale, softcap, sinks)

    model.forward(step.tokens, step.positions, attend, torch.empty(0, dtype=torch.int64, device=model.device))
    return torch.stack([scores[layer] for layer in range(len(model.layers))])
