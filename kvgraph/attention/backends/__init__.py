"""Attention backends: one function for each kind of device. See `kvgraph.attention.backends.base.Backend`."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from kvgraph.attention.backends.base import Backend


def backend_for(device: torch.device) -> Backend:
    """The fastest exact backend for a device: fused CPU attention, Triton on NVIDIA GPUs, plain torch elsewhere."""
    if device.type == "cpu":
        from kvgraph.attention.backends.cpu import attend

        return attend
    if device.type == "cuda" and torch.version.cuda and find_spec("triton"):
        from kvgraph.attention.backends.triton import attend as triton

        return triton
    from kvgraph.attention.backends.reference import attend as reference

    return reference
