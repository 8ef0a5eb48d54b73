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


def restore(x: Tensor, scale: Tensor, zero: Tensor, group: int, first: int, length: int) -> None:
    """Turn codes into the numbers of `quantised`, in place.

    x: [G, m, C] float32, the codes from index `first` of an axis that has `length` of them. scale, zero: of the whole axis.
    """
    group = min(group, length)
    last = first + x.shape[1]
    start = min(last, -(-first // group) * group)
    end = max(start, last // group * group)
    for a, b in ((first, start), (start, end), (end, last)):  # the rest of a group, whole groups, the start of one
        if a < b:
            parts = torch.unflatten(x[:, a - first : b - first], 1, (-1, min(group, b - a)))
            here = slice(a // group, -(-b // group))
            parts.mul_(scale[:, here].float().unsqueeze(2)).add_(zero[:, here].float().unsqueeze(2))


def packed_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., L] uint8 of 1, 2, 4 or 8 bits as bytes [..., ceil(L * bits / 8)], the first code lowest."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each))
    parts = padded.view(*codes.shape[:-1], -1, each)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def unpacked_bits(data: Tensor, bits: int) -> Tensor:
    """The codes of bytes [G, W, C] that `packed_bits` packed along what is now axis 1: [G, W * 8 / bits, C] float32."""
    heads, width, channels = data.shape
    each = 8 // bits
    codes = torch.empty(heads, width, each, channels, device=data.device)
    for i in range(each):
        codes[:, :, i] = (data >> (bits * i)) & ((1 << bits) - 1)
    return codes.view(heads, width * each, channels)
