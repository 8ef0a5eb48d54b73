"""Attention backends: one function for each kind of device. See `kvgraph.attention.backends.base.Backend`.

On NVIDIA GPUs, whole steps run in the kernels of `triton` instead; see `kvgraph.attention.cuda`.
"""

from __future__ import annotations

import torch

from kvgraph.attention.backends import cpu, reference
from kvgraph.attention.backends.base import Backend


def backend_for(device: torch.device) -> Backend:
    """The fastest backend for a device: compiled and fused attention on CPUs, plain torch elsewhere."""
    return cpu.attend if device.type == "cpu" else reference.attend
