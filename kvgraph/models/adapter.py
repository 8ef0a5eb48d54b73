"""The transformers adapter: run a causal LM with our attention.

Attention is replaced through transformers' `AttentionInterface`. The model's code is unchanged; it runs on one packed
sequence without a cache and hands every layer's rotated queries, keys and values to a function. What a layer does
(rotation, sliding window, head sizes) is observed in a probe and not inferred from the model's name.

Shapes: T packed tokens, H query heads, G key/value heads, D key head size, Dv value head size, V vocabulary.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from kvgraph.attention.rope import Rotary
from kvgraph.errors import ModelError
from kvgraph.models.config import declared, end_ids, limit_of, vocabulary_of
from kvgraph.models.matrices import count

# (layer, q [H, T, D], k [G, T, D], v [G, T, Dv], scale, softcap or None, sinks [H] or None) -> [H, T, Dv]
Attend = Callable[[int, Tensor, Tensor, Tensor, float, float | None, Tensor | None], Tensor]

IMPLEMENTATION = "kvgraph"


@dataclass(frozen=True)
class Layer:
    """What attention needs to know of one layer.

    rotary: index into Model.rotaries; None if the layer doesn't rotate.
    window: a key is visible only if the query's position - the key's position < window; None means no limit.
    kv_heads, key_dim, value_dim: G, D and Dv.
    """

    rotary: int | None
    window: int | None
    kv_heads: int
    key_dim: int
    value_dim: int


class Model:
    """A causal LM as the engine sees it; made by `load` or `wrap`.

    hf: the transformers model, in eval mode. Between calls it behaves as before, except for float64 rotary angles.
    tokenizer: its tokenizer, or None.
    name: for people.
    fingerprint: 64 hex digits, equal only for models that compute the same KV.
    limit: positions must stay below it.
    parameters: how many numbers its weights have.
    tuned_for: methods that the model's config, or the front matter of its card (README.md), declares tuning for, under
        the key "kvgraph": {"tuned_for": [...]}.

    One call runs at a time.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: Any,
        name: str,
        fingerprint: str,
        rotaries: tuple[Rotary, ...],
        layers: tuple[Layer, ...],
    ):
        self.hf, self.tokenizer = hf, tokenizer
        self.name, self.fingerprint = name, fingerprint
        self.rotaries, self.layers = rotaries, layers
        self.dtype: torch.dtype = hf.dtype
        self.device: torch.device = hf.device
        self.limit = limit_of(hf.config)
        self.heads: int = hf.config.num_attention_heads
        self.vocab_size = vocabulary_of(hf)
        self.parameters = count(hf)
        self.tuned_for = declared(hf.config.to_dict(), f"{name}'s config")
        numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
        self.kv_bytes_per_token = numbers * self.dtype.itemsize

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer; a server may give the tokenizer another chat template, and so another one."""
        return end_ids(self.hf, self.tokenizer)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, want: Tensor) -> Tensor:
        """Run the model once on `tokens` [T] at `positions` [T], both int64; `attend` is each layer's attention.

        Returns the logits [n, V] float32 of the tokens `want` [n] (int64 indices into T; may be empty). `attend` alone
        decides which token sees which. It gets queries and keys rotated to `positions`.
        """

        return run(self.hf, tokens, positions, _packed(attend), want)

    def dense(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        *,
        group: Tensor | None = None,
        groups: Sequence[tuple[float, float]] = (),
    ) -> Tensor:
        """The slow reference: logits [T, V] float32 of one forward with transformers' own eager attention.

        tokens, positions: [T] int64; positions may be negative.
        visible: [T, T] bool, row attends to column. Sliding windows also apply, by distance of positions.
        group, groups: [T, T] columns that a row weighs together, and (temperature, scale) of each group, as in
            `kvgraph.plan.Dense`. transformers has no groups; attention is then written out by the definition.

        It uses none of kvgraph's attention.
        """
        tokens, positions, visible = (t.to(self.device) for t in (tokens, positions, visible))
        distance = positions[:, None] - positions[None]
        windows = {layer.window for layer in self.layers}
        seen = {w: visible if w is None else visible & (distance < w) for w in windows}
        # Float masks on purpose: eager attention would add a bool one to the scores.
        zeros = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        masks = {window: zeros.masked_fill(~mask, -math.inf)[None, None] for window, mask in seen.items()}
        members = [] if group is None else [group.to(self.device) == i for i in range(1, len(groups) + 1)]

        def layer(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
            window = self.layers[layer_index(module)].window
            if members:
                return grouped_attention(q, k, v, seen[window], list(zip(members, groups, strict=True)), **kwargs)
            eager = sys.modules[type(module).__module__].eager_attention_forward
            return cast(Tensor, eager(module, q, k, v, masks[window], **kwargs)[0])

        return run(self.hf, tokens, positions, layer, torch.arange(len(tokens), device=self.device))


class Trainable:
    """A causal LM as training sees it; made by `trainable`.

    hf: the transformers model, which now runs with our attention.
    layers, limit: as in Model.

    Its weights change, so it has no fingerprint. To run it in an engine, `wrap(trainable.hf)` again after every change.
    """

    def __init__(self, hf: PreTrainedModel, layers: tuple[Layer, ...]):
        self.hf, self.layers = hf, layers
        self.limit = limit_of(hf.config)

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, want: Tensor, module: Callable[..., Any] | None = None
    ) -> Tensor:
        """As `Model.forward`, with gradients; `attend` may run again in the backward pass.

        module: what to call instead of hf if hf is wrapped (peft, DistributedDataParallel, FSDP).
        """
        return _call(module or self.hf, tokens, positions, _packed(attend), want)


# -- running the model with our attention ----------------------------------------------------------------------------

_LOCKS: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_LayerCall = Callable[..., Tensor]  # (module, q [1, H, T, D], k, v, **what the model passes) -> [1, T, H, Dv]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attend: _LayerCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attend is None:
        raise ModelError(
            f"{type(module).__name__} can't be run: its model doesn't pass keyword arguments on to it, "
            "or was called directly after kvgraph.models.trainable"
        )
    if attention_mask is not None:
        raise ModelError(f"{type(module).__name__} can't be run: its model makes its own attention mask")
    return attend(module, query, key, value, **kwargs).contiguous(), None


# No mask function on purpose: transformers then makes no mask and never reads positions, which would wait for a GPU.
AttentionInterface.register(IMPLEMENTATION, _attention)


def run(hf: PreTrainedModel, tokens: Tensor, positions: Tensor, attend: _LayerCall, want: Tensor) -> Tensor:
    """One forward of [T] tokens; `attend` is every layer's attention. Returns the logits [n, V] float32 of `want`."""
    with lock_of(hf), torch.no_grad(), attention_set(hf.config, IMPLEMENTATION):
        return _call(hf, tokens, positions, attend, want)


def lock_of(hf: PreTrainedModel) -> threading.RLock:
    """Who holds it runs the model, or changes how it runs."""
    return _LOCKS.setdefault(hf, threading.RLock())


def _call(module: Callable[..., Any], tokens: Tensor, positions: Tensor, attend: _LayerCall, want: Tensor) -> Tensor:
    """As `run`, for a model (or a wrapper of one) that is already set to our attention."""
    result = module(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        logits_to_keep=want,
        attend=attend,
    )
    return cast(Tensor, result.logits[0].float())


def _packed(attend: Attend) -> _LayerCall:
    """An Attend in the form that transformers' layers call, on one packed sequence."""

    def layer(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float, **kwargs: Any) -> Tensor:
        out = attend(layer_index(module), q[0], k[0], v[0], scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
        return out.transpose(0, 1)[None]

    return layer


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    groups: Sequence[tuple[Tensor, tuple[float, float]]],
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention where each group of columns competes as one, by the definition in `kvgraph.plan.Group`.

    q [1, H, T, D], k [1, G, T, D], v [1, G, T, Dv]; seen [T, T] bool; groups: (columns [T, T] bool, (temperature,
    scale)); s_aux: sinks [H]. Returns [1, T, H, Dv], computed in float32.
    """
    dtype, heads = q.dtype, q.shape[1]
    q, k, v = (t[0].float().repeat_interleave(heads // t.shape[1], 0) for t in (q, k, v))

    def scores(columns: Tensor, temperature: float = 1.0) -> Tensor:
        s = q @ k.mT * scaling / temperature
        s = s if softcap is None else torch.tanh(s / softcap) * softcap
        return s.masked_fill(~(seen & columns), -math.inf)

    alone = ~torch.stack([columns for columns, _ in groups]).any(0)
    competing, outputs = [scores(alone)], []  # competing: [H, T, T], then [H, T, 1] per group and for the sinks
    for columns, (temperature, scale) in groups:
        inside = scores(columns, temperature)
        outputs.append(torch.softmax(inside, -1).nan_to_num(0) @ v)  # NaN where a row sees nothing of the group
        competing.append(torch.logsumexp(inside, -1, keepdim=True) * scale)
    if s_aux is not None:
        competing.append(s_aux.float()[:, None, None].expand(-1, q.shape[1], 1))
    weights = torch.softmax(torch.cat(competing, -1), -1)
    width = seen.shape[-1]
    out = weights[..., :width] @ v
    for i, output in enumerate(outputs, width):
        out = out + weights[..., i : i + 1] * output
    return out.transpose(0, 1)[None].to(dtype)


def layer_index(module: nn.Module) -> int:
    """The layer an attention module belongs to."""
    return cast(int, module.layer_idx)


@contextmanager
def attention_set(config: PreTrainedConfig, implementation: str) -> Iterator[None]:
    """Inside, the model uses this attention implementation; afterwards, the one it had before."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before
