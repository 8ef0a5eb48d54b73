"""What an attention backend is: one function over parts, (out, log-sum-exp) for every pair, chosen by device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Part(NamedTuple):
    """Query columns `columns` attend to keys [G, N, D] and values [G, N, Dv].

    mask: bool [n, N], True where visible, at least one a row; None: everything is visible, or, with `causal`, column i
    of n sees the first i + 1 of N = n keys.
    """

    columns: slice
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    causal: bool = False


class Rope(Protocol):
    """A rotation by whole positions; see `kvgraph.rope.Rotary`."""

    def table(self, delta: Tensor) -> tuple[Tensor, Tensor]: ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


# (q [H, C, D] float32, parts that cover every column exactly once, scale, softcap) -> out [H, C, Dv], lse [H, C] float32
Backend = Callable[[Tensor, Sequence[Part], float, float | None], tuple[Tensor, Tensor]]


def backend_for(device: torch.device) -> Backend:
    """The fastest exact backend for a device: fused CPU attention, Triton on NVIDIA GPUs, plain torch elsewhere."""
    if device.type == "cpu":
        from kvgraph.attention.cpu import attend

        return attend
    if device.type == "cuda" and torch.version.cuda and find_spec("triton"):
        from kvgraph.attention.triton import attend as triton

        return triton
    from kvgraph.attention.reference import attend as reference

    return reference
