"""What each layer does (rotation, sliding window, head sizes), observed in a probe.

Shapes: T packed tokens, V vocabulary, H query heads, G key/value heads, D key head size, Dv value head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvgraph.attention.rope import Rotary
from kvgraph.errors import ModelError
from kvgraph.models.adapter import Layer, Model, attention_set, layer_index, run
from kvgraph.models.config import limit_of, vocabulary_of


@dataclass(frozen=True)
class _Observed:
    """What one layer gave its attention. q [H, T, D], k [G, T, D], v [G, T, Dv], rotated."""

    q: Tensor
    k: Tensor
    v: Tensor
    window: int | None


def probe(hf: PreTrainedModel, tables: list[Tensor]) -> tuple[tuple[Rotary, ...], tuple[Layer, ...]]:
    """Run tokens once at two sets of positions and find, for every layer, the rotation that turns one into the other.

    Attention returns each token's own value. Therefore hidden states don't depend on positions, and queries and keys
    depend on them only through rotation. A model for which this doesn't hold can't be composed and is refused.
    """
    moves = torch.tensor([1, 7, 150, 1_000, 5_000, 20_000])  # large ones tell slow frequencies apart
    n, limit = len(moves), limit_of(hf.config)
    if limit < 2 * n:
        raise ModelError(f"the model's limit of {limit} positions is too small")
    moves %= limit - n
    tokens = torch.arange(n) % vocabulary_of(hf)
    positions = torch.arange(n)
    seen: dict[int, _Observed] = {}

    def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        layer = layer_index(module)
        if not getattr(module, "is_causal", True):
            raise ModelError(f"layer {layer} has bidirectional attention")
        if kwargs.get("position_bias") is not None:
            raise ModelError(f"layer {layer} adds a position bias to its scores")
        if kwargs.get("scaling") is None:
            raise ModelError(f"layer {layer} doesn't say how it scales its scores")
        seen[layer] = _Observed(
            q[0].float().cpu(), k[0].float().cpu(), v[0].float().cpu(), kwargs.get("sliding_window")
        )
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2)

    both = torch.cat([tokens, tokens]).to(hf.device), torch.cat([positions, positions + moves]).to(hf.device)
    run(hf, *both, observe, torch.empty(0, dtype=torch.int64, device=hf.device))
    if sorted(seen) != list(range(hf.config.num_hidden_layers)):
        raise ModelError(
            f"only layers {sorted(seen)} of {hf.config.num_hidden_layers} use transformers' attention interface"
        )
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[hf.dtype]
    candidates = [None, *(Rotary(t, interleaved) for t in tables for interleaved in (False, True))]
    rotaries: list[Rotary] = []
    layers = []
    for index in range(len(seen)):
        one = seen[index]
        if _error(None, one.v, moves) > tolerance:
            raise ModelError(f"layer {index}'s values depend on positions (learned absolute positions?)")
        fitting = [r for r in candidates if r is None or r.dims <= one.k.shape[-1]]
        found = min(fitting, key=lambda rotary: _error(rotary, one.k, moves))
        if _error(found, one.k, moves) > tolerance:
            raise ModelError(f"layer {index}'s keys don't follow any rotary table of the model")
        if _error(found, one.q, moves) > tolerance:
            raise ModelError(f"layer {index}'s queries depend on positions by more than their rotation")
        if found is not None and found not in rotaries:
            rotaries.append(found)
        rotary = None if found is None else rotaries.index(found)
        layers.append(Layer(rotary, one.window, one.k.shape[0], one.k.shape[-1], one.v.shape[-1]))
    _check_windows(hf.config, layers)
    return tuple(rotaries), tuple(layers)


def _error(rotary: Rotary | None, x: Tensor, moves: Tensor) -> float:
    """How far the first half of x [heads, 2n, D], moved, is from the second: root mean square, relative to x."""
    first, second = x.chunk(2, 1)
    moved = first if rotary is None else rotary.rotate(first, *rotary.table(moves))
    return float((moved - second).norm() / second.norm().clamp_min(1e-30))


def _check_windows(config: PreTrainedConfig, layers: list[Layer]) -> None:
    types = getattr(config, "layer_types", None) or []
    if not types and getattr(config, "sliding_window", None) and all(layer.window is None for layer in layers):
        raise ModelError("the config has a sliding window, but no layer passes it to its attention")
    for index, (kind, layer) in enumerate(zip(types, layers, strict=False)):
        if (kind == "sliding_attention") != (layer.window is not None):
            raise ModelError(f"layer {index} is declared {kind} but its attention runs with window {layer.window}")


def plain_logits(hf: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Tokens [T] and their logits [T, V] by the unchanged model (eager: sdpa has ignored softcaps in some versions)."""
    n = min(64, limit_of(hf.config))
    tokens = torch.arange(n, device=hf.device) * 7 % vocabulary_of(hf)
    with torch.no_grad(), attention_set(hf.config, "eager"):
        return tokens, hf(input_ids=tokens[None], use_cache=False).logits[0].float()


def require_equal(model: Model, tokens: Tensor, logits: Tensor) -> None:
    """Check that an untested model gives its own plain logits. This catches masks that the probe can't see."""
    n = len(tokens)
    ours = model.dense(tokens, torch.arange(n), torch.ones(n, n, dtype=torch.bool).tril())
    limit = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}[model.dtype]
    worst = float((ours - logits).abs().max() / logits.std())
    if not worst <= limit:
        raise ModelError(f"{model.name} differs from its own plain forward by {worst:.2g} standard deviations")
