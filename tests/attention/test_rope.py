"""The rotation against complex numbers and long doubles, and its algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import families
from kvgraph import models
from kvgraph.attention.rope import Rotary

FREQUENCIES = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
POSITIONS = st.lists(st.integers(-200_000, 200_000), min_size=1, max_size=5)


def complex_rotation(x: np.ndarray, delta: list[int], interleaved: bool) -> np.ndarray:
    """The definition: pairs as complex numbers, times exp(i * position * frequency); the rest passes. x [n, D]."""
    half = len(FREQUENCIES)
    turned = x[:, : 2 * half].astype(np.float64)
    pairs = turned.reshape(len(x), half, 2) if interleaved else turned.reshape(len(x), 2, half).transpose(0, 2, 1)
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.outer(delta, FREQUENCIES.numpy()))
    back = np.stack([z.real, z.imag], -1)
    back = back if interleaved else back.transpose(0, 2, 1)
    return np.concatenate([back.reshape(len(x), 2 * half), x[:, 2 * half :]], 1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [8, 12])
@given(delta=POSITIONS)
def test_rotation_is_the_complex_one(interleaved, size, delta):
    rotary = Rotary(FREQUENCIES, interleaved)
    x = torch.randn(2, len(delta), size, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    got = rotary.rotate(x, *rotary.table(torch.tensor(delta)))
    assert torch.equal(x, before) and got.dtype == torch.float32 and rotary.dims == 8
    for head in range(2):
        expected = complex_rotation(x[head].numpy(), delta, interleaved)
        assert np.abs(got[head].numpy() - expected).max() < 1e-5


@given(POSITIONS, st.integers(-200_000, 200_000))
def test_rotating_the_query_back_equals_rotating_the_key(delta, at):
    rotary = Rotary(FREQUENCIES)
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(len(delta), 8, generator=generator) for _ in range(2))
    here, moved = torch.tensor(delta), torch.full((len(delta),), at)
    plain = rotary.rotate(q, *rotary.table(here)) * rotary.rotate(k, *rotary.table(moved))
    back = rotary.rotate(q, *rotary.table(here - moved)) * k
    assert torch.allclose(plain.sum(-1), back.sum(-1), atol=1e-5)


def test_16_bit_input_is_rotated_in_float32():
    rotary = Rotary(FREQUENCIES)
    x = torch.randn(3, 8).to(torch.bfloat16)
    table = rotary.table(torch.tensor([1, 2, 3]))
    assert torch.equal(rotary.rotate(x, *table), rotary.rotate(x.float(), *table))


def long_double_table(inv_freq: torch.Tensor, position: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.longdouble(position) * inv_freq.numpy().astype(np.longdouble)
    return np.cos(angle), np.sin(angle)


def test_angles_are_right_at_position_100_000_where_float32_ones_are_not():
    hf = families.FAMILIES["llama"]()
    position = torch.tensor([[100_000]])
    theirs, _ = hf.model.rotary_emb(torch.zeros(1), position)
    (rotary,) = models.wrap(hf).rotaries
    cos, sin = rotary.table(position[0])
    exact_cos, exact_sin = long_double_table(rotary.inv_freq, 100_000)
    assert np.abs(cos[0].numpy() - exact_cos).max() < 1e-6
    assert np.abs(sin[0].numpy() - exact_sin).max() < 1e-6
    assert np.abs(theirs[0, 0, : len(exact_cos)].numpy() - exact_cos).max() > 1e-4
    ours, _ = hf.model.rotary_emb(torch.zeros(1), position)  # the wrapped model's own table
    assert np.abs(ours[0, 0, : len(exact_cos)].numpy() - exact_cos).max() < 1e-6


def test_a_delta_rotation_has_no_attention_scaling():
    model = models.wrap(families.FAMILIES["qwen2"]())
    assert model.hf.model.rotary_emb.attention_scaling > 1.1
    (rotary,) = model.rotaries
    cos, sin = rotary.table(torch.tensor([0, 12345]))
    assert torch.allclose(cos**2 + sin**2, torch.ones_like(cos), atol=1e-6)
