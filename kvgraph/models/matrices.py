"""The matrices of a model that is only run on a CPU, in the form in which its kernels read them fastest.

A decode step multiplies every matrix by a few rows, so most of its time goes into reading the matrices. torch reorders a bfloat16
matrix for oneDNN at each product. Here that is done once, at load, and a product with one row takes a third to a half of the time.
With `quantize`, each number of a matrix has 8 or 4 bits instead. Only weights are quantised: inputs, sums and attention stay as they
are, and so do the output layer and the embeddings.

Shapes: M rows, N outputs, K inputs, G = K / GROUP groups of an output's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraph.errors import ModelError
from kvgraph.models.gguf import multiplies_bf16

BITS = ("int8", "int4")
GROUP = 32  # inputs of an output that share a scale and a zero in int4; GGUF's 4-bit formats have the same
MULTIPLE = 64  # int4 kernels want outputs in such numbers


class Ordered(nn.Module):
    """A linear layer in bfloat16, in oneDNN's order."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.matrix = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.bias, "none", [], "")
        return made


class Quantised(nn.Module):
    """A linear layer with a quantised matrix. Both of its ways multiply by the same numbers.

    few: up to so many rows, torch's kernel for quantised matrices is faster than making the matrix.
    """

    few: int

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.numbers = linear.weight.numel()
        self.bias = linear.bias
        self.wide = torch.bfloat16 if multiplies_bf16() else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= self.few:
            made = self.by_few(rows)
        else:
            made = nn.functional.linear(rows.to(self.wide), self.matrix(self.wide)).to(x.dtype)
        made = made if self.bias is None else made + self.bias
        return made.view(*x.shape[:-1], -1)

    def by_few(self, rows: Tensor) -> Tensor:
        """rows [M, K] by torch's kernel for quantised matrices -> [M, N]."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The numbers of the matrix [N, K]."""
        raise NotImplementedError


class EightBits(Quantised):
    """One scale for every output."""

    few = 4

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp_min(1e-12).to(torch.bfloat16)
        self.codes = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)  # [N, K]
        self.scale = scale  # [N]

    def by_few(self, rows: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(rows, self.codes, self.scale)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype) * self.scale[:, None].to(dtype)


class FourBits(Quantised):
    """A scale and a zero for every GROUP inputs of an output: number = (code - 8) * scale + zero."""

    few = 64

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        weight = linear.weight.detach().float()
        groups = weight.view(len(weight), -1, GROUP)  # [N, G, GROUP]
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp_min(1e-12).to(torch.bfloat16)
        zero = (low + 8 * scale.float()).to(torch.bfloat16)
        codes = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
        codes = codes.view(weight.shape).to(torch.int32)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales = torch.stack([scale.T, zero.T], -1).contiguous()  # [G, N, 2]
        self.halves = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)  # [N, K / 2]; the kernel's order is its own

    def by_few(self, rows: Tensor) -> Tensor:
        made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)
        return made

    def matrix(self, dtype: torch.dtype) -> Tensor:
        codes = torch.stack([self.halves & 15, self.halves >> 4], -1).view(len(self.halves), -1, GROUP)
        scale, zero = (t.T[..., None].to(dtype) for t in self.scales.unbind(-1))
        return torch.addcmul(zero, codes.to(dtype) - 8, scale).reshape(len(codes), -1)


def quantise(hf: PreTrainedModel, bits: str) -> None:
    """Quantise the matrices of a bfloat16 model on a CPU, in place. Layers that the kernels don't take keep theirs."""
    output = hf.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    for module in list(hf.modules()):
        for name, child in module.named_children():
            if type(child) is not nn.Linear or child is output:
                continue
            if bits == "int8":
                setattr(module, name, EightBits(child))
            elif child.in_features % GROUP == 0 and child.out_features % MULTIPLE == 0:
                setattr(module, name, FourBits(child))


def order(hf: PreTrainedModel) -> None:
    """Bring the bfloat16 matrices of a model on a CPU into oneDNN's order, in place, where it has fast products of them.

    Its linear layers have no `weight` then: it can be run, but neither saved nor trained.
    """
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if hf.device.type != "cpu" or not (there and multiplies_bf16()):
        return
    for module in list(hf.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16:
                setattr(module, name, Ordered(child))


def count(hf: PreTrainedModel) -> int:
    """How many numbers a model's weights have, before they are brought into another order."""
    quantised = sum(m.numbers for m in hf.modules() if isinstance(m, Quantised))
    return quantised + sum(p.numel() for p in hf.parameters())


def checked(bits: str | None, dtype: torch.dtype | str, device: torch.device) -> str | None:
    """What to quantise to. Raises ModelError with the reason if that can't be."""
    if bits is None:
        return None
    if bits not in BITS:
        raise ModelError(f"quantize {bits} isn't supported; use {' or '.join(BITS)}, or leave it out")
    if device.type != "cpu":
        raise ModelError(f"quantize {bits} runs on CPUs only; leave it out, or use device cpu")
    if dtype not in ("auto", "bfloat16", torch.bfloat16):
        shown = str(dtype).removeprefix("torch.")
        raise ModelError(f"quantize {bits} goes with bfloat16; leave out dtype {shown}, or quantize")
    return bits
