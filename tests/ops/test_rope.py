"""Rotary positions: scores depend on distances only, wherever the frame stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plait.ops import Rope, rotate

FREQUENCIES = 1.0 / (10000.0 ** (torch.arange(0, 64, 2) / 64))
ROPE = Rope(FREQUENCIES)
# Rounding of cosine, sine and the two products to fp32, for unit vectors of 64 channels.
FRAME_TOLERANCE = 1e-5


def unit(*shape: int) -> Tensor:
    x = torch.randn(*shape)
    return x / x.norm(dim=-1, keepdim=True)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """The definition, in complex float64: channel pair (c, c + R/2) times e^(i angle)."""
    half = len(FREQUENCIES)
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    angles = positions.double()[:, None] * FREQUENCIES.double()
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :].double()], dim=-1)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_rotation_equals_complex_multiplication(head_dim: int) -> None:
    x, positions = unit(40, 3, head_dim), torch.arange(40) * 211
    torch.testing.assert_close(
        rotate(x, ROPE.angles(positions)).double(), turned(x, positions), atol=1e-6, rtol=0
    )


def test_channels_that_are_not_rotated_pass_unchanged() -> None:
    x = torch.randn(5, 2, 80)
    assert torch.equal(rotate(x, ROPE.angles(torch.arange(5)))[..., 64:], x[..., 64:])


def test_position_zero_changes_nothing_and_norms_are_kept() -> None:
    x = torch.randn(1, 2, 64)
    assert torch.equal(rotate(x, ROPE.angles(torch.tensor([0]))), x)
    far = rotate(x, ROPE.angles(torch.tensor([123456])))
    torch.testing.assert_close(far.norm(dim=-1), x.norm(dim=-1))


def scores(q: Tensor, k: Tensor, query: int, keys: Tensor, rope: Rope = ROPE) -> Tensor:
    rotated_q = rotate(q, rope.angles(torch.tensor([query])))
    return (rotated_q * rotate(k, rope.angles(keys))).sum(dim=-1)


@pytest.mark.parametrize("shift", [1, 977, 100_000])
def test_scores_depend_on_distances_only(shift: int) -> None:
    q, k, keys = unit(1, 2, 64), unit(300, 2, 64), torch.arange(300) * 27
    here, there = scores(q, k, 8191, keys), scores(q, k, 8191 + shift, keys + shift)
    torch.testing.assert_close(here, there, atol=FRAME_TOLERANCE, rtol=0)


@pytest.mark.parametrize("by", [-4096, -1, 1, 255, 4096])
def test_turning_the_query_back_equals_encoding_the_keys_elsewhere(by: int) -> None:
    q, k = unit(1, 2, 64), unit(8193, 2, 64)
    keys = torch.arange(8193)
    moved = scores(q, k, 9000 - by, keys)
    encoded = scores(q, k, 9000, keys + by)
    torch.testing.assert_close(moved, encoded, atol=FRAME_TOLERANCE, rtol=0)


def test_angles_in_fp32_break_frames_and_angles_in_fp64_do_not() -> None:
    q, k, keys = unit(1, 2, 64), unit(8193, 2, 64), torch.arange(8193)

    def error(rope: Rope) -> float:
        moved = scores(q, k, 9000 - 4096, keys, rope)
        return (moved - scores(q, k, 9000, keys + 4096, rope)).abs().max().item()

    assert error(ROPE) < 1e-6
    assert error(Rope(FREQUENCIES, dtype=torch.float32)) > 1e-5


def test_amplitude_scales_queries_and_keys() -> None:
    x, positions = torch.randn(7, 2, 64), torch.arange(7)
    plain, louder = ROPE.angles(positions), Rope(FREQUENCIES, amplitude=1.5).angles(positions)
    torch.testing.assert_close(rotate(x, louder), 1.5 * rotate(x, plain))


def test_speeds_that_depend_on_the_length_come_from_the_rule() -> None:
    rope = Rope(FREQUENCIES, rule=lambda length: (FREQUENCIES / length, 2.0), dtype=torch.float32)
    fixed = rope.for_length(4)
    assert torch.equal(fixed.frequencies, FREQUENCIES / 4)
    assert (fixed.amplitude, fixed.dtype) == (2.0, torch.float32)
    assert ROPE.for_length(10**6) is ROPE


def test_angles_follow_the_device_of_the_positions() -> None:
    angles = ROPE.angles(torch.arange(3, device="meta"))
    assert angles.cos.device.type == angles.sin.device.type == "meta"
    assert angles.cos.dtype == torch.float32
