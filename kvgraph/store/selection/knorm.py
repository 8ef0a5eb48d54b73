"""Key norm (Devoto et al., arXiv 2406.11430): keys with a small L2 norm get much attention, whoever asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvgraph.store.selection.checks import percent


@dataclass(frozen=True)
class KeyNorm:
    """Parameters:
    keep: percent of tokens that every head keeps.
    """

    keep: int = 50

    name: ClassVar[str] = "knorm"
    window: ClassVar[int] = 0

    def __post_init__(self) -> None:
        percent(self.name, self.keep)

    def scores(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor:
        """Minus the norm of the key."""
        norms: Tensor = torch.linalg.vector_norm(keys.float(), dim=2)
        return -norms
