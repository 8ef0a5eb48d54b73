"""Uniform quantisation in groups, and codes of a few bits packed into bytes: what KIVI and GEAR have in common.

Letters in shapes: G heads, N tokens, D channels, M the length of the axis that is cut into groups, C the other one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 65504.0  # of float16, in which scales are kept


def quantised(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [G, M, C] uint8 and, for every `group` numbers along axis 1, scale and zero [G, ceil(M / group), C] float16.

    x: [G, M, C] float32. A number is code * scale + zero. The rounded scale and zero are what codes are chosen for, so an
    error is at most half a step, beside what rounding scale and zero moves the ends of the range.
    """
    heads, length, channels = x.shape
    group = min(group, length)  # a longer one would only be padded
    groups = math.ceil(length / group)
    last = x[:, -1:].expand(heads, groups * group - length, channels)  # repeats change no minimum and no maximum
    parts = torch.cat([x, last], 1).view(heads, groups, group, channels)
    zero = parts.amin(2).clamp(-LARGEST, LARGEST).half()
    most = (1 << bits) - 1
    scale = ((parts.amax(2) - zero.float()) / most).clamp(0, LARGEST).half()
    step = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    codes = ((parts - zero.float().unsqueeze(2)) / step.unsqueeze(2)).round().clamp(0, most)
    return codes.view(heads, groups * group, channels)[:, :length].to(torch.uint8), scale, zero


def restored(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """The numbers [G, M, C] float32 of `quantised`."""
    length = codes.shape[1]
    group = min(group, length)
    scale, zero = (t.float().repeat_interleave(group, 1)[:, :length] for t in (scale, zero))
    return codes * scale + zero


def packed_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., L] uint8 of 1, 2, 4 or 8 bits as bytes [..., ceil(L * bits / 8)], the first code lowest."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each))
    parts = padded.view(*codes.shape[:-1], -1, each)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def unpacked_bits(data: Tensor, bits: int, length: int) -> Tensor:
    """The codes [..., length] uint8 of `packed_bits`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    codes = (data.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :length]
