"""Rotary position embeddings by whole positions: the only rotation kvgraph does itself.

RoPE (arXiv 2104.09864, section 3.4) turns pair i of a head's dimensions by position * inv_freq[i]. It is relative:
rotating both a query and a key by -a leaves their product unchanged. Therefore stored keys stay, and queries are moved.

Shapes: n tokens, D head size, R <= D rotated dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """How one kind of layer rotates: the first R = 2 * len(inv_freq) dimensions of a head; the others pass unchanged.

    inv_freq: [R/2] float64, radians a position. interleaved: dimensions (2i, 2i + 1) make pair i; otherwise
    (i, i + R/2) do.
    """

    inv_freq: Tensor
    interleaved: bool = False

    @property
    def dims(self) -> int:
        """R, the number of rotated dimensions."""
        return 2 * self.inv_freq.shape[0]

    def table(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [n, R/2] float32 on delta's device, that move by `delta` [n] int64 positions.

        Angles are float64; in float32 they would be off by 3e-3 at position 100,000. A model's attention scaling (YaRN,
        arXiv 2309.00071, section 3.4) isn't applied here: queries and keys have it already, and moving must keep norms.
        """
        angle = delta.to(torch.float64)[:, None] * self.inv_freq.to(delta.device)
        return angle.cos().float(), angle.sin().float()

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., n, D] rotated by a table's cos and sin [n, R/2]; a new float32 tensor."""
        source = x.float()
        result = source.clone()
        a, b = self._pair(source)
        first, second = self._pair(result)
        first.mul_(cos).addcmul_(b, sin, value=-1)
        second.mul_(cos).addcmul_(a, sin)
        return result

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the first and second dimension of every pair, each [..., n, R/2]."""
        if self.interleaved:
            return x[..., 0 : self.dims : 2], x[..., 1 : self.dims : 2]
        half = self.dims // 2
        return x[..., :half], x[..., half : self.dims]
