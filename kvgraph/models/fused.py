"""A model's norms, rotations and gated activations in one kernel each, on an NVIDIA GPU.

transformers writes them as several elementwise kernels each. When few tokens run, starting these takes longer than their work.
A module gets one of the kernels here only where the kernel gives the module's own results on random inputs: names say
what to try, and the comparison decides. All other modules keep their own code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraph.attention.backends.elementwise import gated_silu, rms_norm, rotary
from kvgraph.models.adapter import lock_of

log = logging.getLogger("kvgraph.models")

ROTARY = "apply_rotary_pos_emb"  # what the families of transformers call it
EQUAL = 0.99  # share of results that must be the same bit by bit: sums in another order change very few of them
_Forward = Callable[..., Any]


class Fused:
    """The forwards of a 16-bit model's modules that use these kernels. The model has them only inside `used`."""

    def __init__(self, hf: PreTrainedModel):
        self._hf = hf
        self.forwards: dict[nn.Module, _Forward] = {}
        if hf.dtype in (torch.bfloat16, torch.float16):
            with lock_of(hf):
                self._find()
        log.debug("%d modules use fused kernels", len(self.forwards))

    def _find(self) -> None:
        rotations: dict[_Forward, _Forward] = {}
        for module in self._hf.modules():
            if "forward" in vars(module):  # somebody, such as accelerate, has replaced it
                continue
            found = _faster(module, self._hf.dtype, self._hf.device, rotations)
            if found is not None:
                self.forwards[module] = found

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the model uses the kernels; afterwards its own code. Nobody else runs it meanwhile."""
        with lock_of(self._hf):
            for module, forward in self.forwards.items():
                vars(module)["forward"] = forward  # as setattr does, without its search for parameters
            try:
                yield
            finally:
                for module in self.forwards:
                    del vars(module)["forward"]


@torch.no_grad()
def _faster(
    module: nn.Module, dtype: torch.dtype, device: torch.device, rotations: dict[_Forward, _Forward]
) -> _Forward | None:
    """A module's forward with one of the kernels; None if none gives its results."""
    try:
        return (
            _faster_norm(module, dtype, device)
            or _faster_gate(module, dtype, device)
            or _faster_attention(module, dtype, device, rotations)
        )
    except Exception as error:  # it takes something else than what is tried here
        log.debug("%s keeps its own code: %s", type(module).__name__, error)
        return None


def _faster_norm(module: nn.Module, dtype: torch.dtype, device: torch.device) -> _Forward | None:
    weight: Any = dict(module.named_parameters()).get("weight")
    if weight is None or weight.ndim != 1 or len(list(module.parameters())) > 1 or weight.dtype != dtype:
        return None
    own = module.forward
    if len(signature(own).parameters) != 1:
        return None
    x = _random((1, 8, len(weight)), dtype, device) * torch.logspace(-3, 1, 8, device=device).to(dtype)[:, None]
    expected = own(x)
    for eps in {value for value in vars(module).values() if isinstance(value, float)}:
        if _same(rms_norm(x, weight, eps), expected):

            def forward(x: Tensor, eps: float = eps) -> Any:
                return rms_norm(x, weight, eps) if x.dtype == dtype else own(x)

            return forward
    return None


def _faster_gate(module: nn.Module, dtype: torch.dtype, device: torch.device) -> _Forward | None:
    names = "gate_proj", "up_proj", "down_proj", "act_fn"
    children: dict[str, Any] = dict(module.named_children())
    if set(children) != set(names) or len(signature(module.forward).parameters) != 1:
        return None
    gate, up, down, act = (children[name] for name in names)
    x = _random((1, 4, gate.in_features), dtype, device)
    g, u = gate(x), up(x)
    wide = _random((2, *g.shape), dtype, device) * 4
    as_expected = _same(down(act(g) * u), module(x))
    if not (as_expected and _same(gated_silu(g, u), act(g) * u) and _same(gated_silu(*wide), act(wide[0]) * wide[1])):
        return None
    return lambda x: down(gated_silu(gate(x), up(x)))


def _faster_attention(
    module: nn.Module, dtype: torch.dtype, device: torch.device, rotations: dict[_Forward, _Forward]
) -> _Forward | None:
    """The module's own forward, which finds another function under the name of its rotation."""
    own, dim = type(module).forward, getattr(module, "head_dim", 0)
    if not isinstance(own, FunctionType) or ROTARY not in own.__code__.co_names or ROTARY not in own.__globals__:
        return None
    if own not in rotations:
        apply = own.__globals__[ROTARY]
        q, k = (_random((1, 5, heads, dim), dtype, device).transpose(1, 2) for heads in (4, 2))
        angle = _random((1, 5, dim // 2), torch.float32, device).repeat(1, 1, 2) * 100
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        if not all(map(_same, rotary(q, k, cos, sin), apply(q, k, cos, sin))):
            return None
        rotations[own] = _with_rotation(own, _rotation(apply))
    return rotations[own].__get__(module)  # type: ignore[no-any-return]


def _rotation(apply: _Forward) -> _Forward:
    """The model's function `apply`, by the kernel for what it was compared on."""

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> Any:
        tensors = (q, k, cos, sin)
        uniform = len({(t.dtype, t.shape[-1]) for t in tensors}) == 1 and all(t.stride(-1) == 1 for t in tensors)
        if more or options or len(q) > 1 or cos.shape != (1, *q.shape[2:]) or not uniform or q.dtype.itemsize != 2:
            return apply(q, k, cos, sin, *more, **options)
        return rotary(q, k, cos, sin)

    return rotation


def _with_rotation(own: FunctionType, rotation: _Forward) -> _Forward:
    """A copy of a function for which the name of its rotation stands for another one."""
    made = FunctionType(
        own.__code__, {**own.__globals__, ROTARY: rotation}, own.__name__, own.__defaults__, own.__closure__
    )
    made.__kwdefaults__ = own.__kwdefaults__
    return made


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers, the same each time, which leave the user's random state as it is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are equal, but for the last bit of very few numbers."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    kind = torch.finfo(found.dtype)
    near = torch.isclose(found.float(), expected.float(), rtol=2 * kind.eps, atol=2 * kind.eps * kind.tiny)
    return bool(near.all()) and float((found == expected).float().mean()) >= EQUAL
