"""Optimizers of a run, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kvgraph.train.config import COSINE, MUON, TRAPEZOID, Config


def optimizers(
    config: Config, module: nn.Module, embeddings: Iterable[Tensor], fixed: Iterable[Tensor]
) -> list[torch.optim.Optimizer]:
    """AdamW for the trained parameters of a module; with "muon", Muon for its matrices and AdamW for the rest.

    embeddings: parameters that have the shape of a matrix but aren't treated as one. fixed: parameters that weight decay
    mustn't shrink, because parts of them stay as they are.
    """
    trained = {p for p in module.parameters() if p.requires_grad}
    matrices = {p for p in trained if p.ndim > 1} - set(embeddings)
    by_muon = {p for p in matrices if p.ndim == 2 and config.optimizer == MUON}  # experts stacked in one tensor aren't
    decayed, order = matrices - set(fixed), list(module.parameters())
    made: list[torch.optim.Optimizer] = []
    if by_muon:
        made.append(torch.optim.Muon(_groups(config, [p for p in order if p in by_muon], decayed), config.matrix_lr))
    if rest := [p for p in order if p in trained - by_muon]:
        # fused: one call for all parameters, which matters for a small model on a CPU
        made.append(torch.optim.AdamW(_groups(config, rest, decayed), config.lr, config.betas, fused=True))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def _groups(config: Config, parameters: Iterable[Tensor], decayed: Collection[Tensor]) -> list[dict[str, Any]]:
    """Parameters as an optimizer takes them: those with weight decay, and those without."""
    split: dict[bool, list[Tensor]] = {True: [], False: []}
    for p in parameters:
        split[p in decayed].append(p)
    return [
        {"params": found, "weight_decay": config.weight_decay if decays else 0.0}
        for decays, found in split.items()
        if found
    ]


def set_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set the learning rate of each group to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share


def share(config: Config, step: int, total: int) -> float:
    """The share of the peak learning rate in step number `step` (from 1) of `total`."""
    warm, falling = round(config.warmup * total), round(config.decay * total)
    if step <= warm:
        return step / warm
    if config.schedule == COSINE:
        return 0.5 * (1 + math.cos(math.pi * (step - 1 - warm) / max(total - warm, 1)))
    if config.schedule == TRAPEZOID and falling:
        return min(1.0, (total - step + 1) / falling)
    return 1.0
