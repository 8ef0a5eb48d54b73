"""Rotary tables: exact float64 angles for every rotary module of a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraph.errors import ModelError


class _Angles:
    """Replaces a rotary module's forward: the same cosines and sines, from float64 angles.

    tables: (inv_freq [R/2] float64, attention scaling) by layer type; the type is None if all layers share one table.
    layout: how the module lays out the R/2 values for its apply function, see _LAYOUTS.
    """

    def __init__(self, tables: dict[str | None, tuple[Tensor, float]], layout: str):
        self.tables, self.layout = tables, layout

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        inv_freq, scaling = self.tables[layer_type]
        if inv_freq.device != position_ids.device:  # the model was moved since, as for training
            inv_freq = inv_freq.to(position_ids.device)
            self.tables[layer_type] = inv_freq, scaling
        angle = position_ids.to(torch.float64)[..., None] * inv_freq
        spread = _LAYOUTS[self.layout]
        return spread(angle.cos() * scaling).to(x.dtype), spread(angle.sin() * scaling).to(x.dtype)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "once": lambda t: t,
    "halves": lambda t: torch.cat([t, t], -1),
    "pairs": lambda t: t.repeat_interleave(2, -1),
}


def exact_angles(hf: PreTrainedModel) -> list[Tensor]:
    """Give every rotary module of the model float64 angles; returns the distinct tables, each [R/2] float64."""
    found: dict[bytes, Tensor] = {}
    for module in hf.modules():
        if not _table_names(module):
            continue
        if not isinstance(module.forward, _Angles):  # a model may be wrapped more than once
            module.forward = _angles(module, hf.device)
        for inv_freq, _ in module.forward.tables.values():
            found[inv_freq.cpu().numpy().tobytes()] = inv_freq.cpu()
    return list(found.values())


def _table_names(module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [n for n in names if n == "inv_freq" or (n.endswith("_inv_freq") and not n.endswith("original_inv_freq"))]


def _angles(module: nn.Module, device: torch.device) -> _Angles:
    who = type(module).__name__
    try:
        # Made again, because `model.to(bfloat16)` rounds the tables of the existing module.
        fresh = type(module)(module.config).cpu()
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{who} isn't a rotary embedding that kvgraph knows ({error})") from None
    tables: dict[str | None, tuple[Tensor, float]] = {}
    for name in _table_names(fresh):
        live, exact = getattr(module, name).float().cpu(), getattr(fresh, name)
        if live.shape != exact.shape or not torch.allclose(live, exact, rtol=1e-2):
            raise ModelError(f"{who}.{name} differs from the model's config; kvgraph needs the config's rotary table")
        kind = name.removesuffix("inv_freq")
        tables[kind.removesuffix("_") or None] = (
            exact.double(),
            float(getattr(fresh, f"{kind}attention_scaling", 1.0)),
        )
    positions = torch.arange(5)[None]
    for layout in _LAYOUTS:
        angles = _Angles(tables, layout)
        if all(_same_tables(fresh, angles, positions, kind) for kind in tables):
            return _Angles({k: (t.to(device), scaling) for k, (t, scaling) in tables.items()}, layout)
    raise ModelError(f"{who} lays out its angles in a way that kvgraph doesn't know")


def _same_tables(fresh: nn.Module, angles: _Angles, positions: Tensor, kind: str | None) -> bool:
    x = torch.zeros(1)
    theirs = fresh(x, positions) if kind is None else fresh(x, positions, kind)
    ours = angles(x, positions, kind)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True))
