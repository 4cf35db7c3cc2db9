"""Dual binary planes against the paper's formulas and brute force."""

from __future__ import annotations

import pytest
import torch
from test_coded import stats_of, weights

from plait.errors import ConfigError
from plait.weights import DBLLM, FORMATS, Coded, DecoupleQ
from plait.weights.db_llm import (
    _CLIPPING,
    PlaneScales,
    _clipped,
    best_scales,
    guarded,
    nearest_planes,
    plane_values,
)
from plait.weights.decoupleq import best_pairs, output_errors
from plait.weights.gptq import damped


def planes_of(packed: Coded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """b1, b2, a1 and a2, the scales for each column."""
    codes = packed.code_rows()
    assert packed.low_scales is not None
    sizes = torch.arange(packed.shape[1]) // (packed.group or packed.shape[1])
    a1, a2 = (packed.per_group(scale).float()[:, sizes] for scale in (packed.scales, packed.low_scales))
    return codes >> 1, codes & 1, a1, a2


@pytest.mark.parametrize("group", [32, 40, 0])
def test_a_new_matrix_is_an_ordinary_grid_of_two_bits(group: int) -> None:
    weight = weights(9, 96)
    packed = DBLLM(start="nearest", group=group).pack(weight)
    for row in range(9):
        for start in range(0, 96, group or 96):
            piece = weight[row, start : start + (group or 96)]
            s = float(torch.maximum(piece.max() / 2, -piece.min()).half())
            levels = s * torch.tensor([-1.0, 0.0, 1.0, 2.0])
            wanted = levels[(piece[:, None] - levels).abs().argmin(dim=1)]
            assert torch.equal(packed.unpack()[row, start : start + (group or 96)], wanted)


def test_planes_are_zeros_and_ones_times_their_scales() -> None:
    packed = DBLLM().pack(weights(20, 100))
    b1, b2, a1, a2 = planes_of(packed)
    side = torch.where(a1 > a2, 1.0, -1.0)
    # Either side may be the long one.
    assert 0.2 < float((side > 0).float().mean()) < 0.8
    assert bool((side * a1 > 0).all() & (side * a2 < 0).all() & (side * (a1 + a2) > 0).all())
    assert torch.equal(packed.unpack(), b1 * a1 + b2 * a2)
    x = torch.randn(3, 100)
    masked = (x[:, None] * b1 * a1).sum(dim=2) + (x[:, None] * b2 * a2).sum(dim=2)
    packed.is_exact = True
    torch.testing.assert_close(packed.matmul(x), masked, rtol=1e-5, atol=1e-5)


def test_planes_choose_the_nearest_level_and_ties_are_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 100_000
    weight = torch.randn(count, 1, generator=generator)
    low = -torch.rand(count, 1, generator=generator) - 1e-3
    side = torch.where(torch.rand(count, 1, generator=generator) < 0.5, -1.0, 1.0)
    scales = guarded(side * (-low + torch.rand(count, 1, generator=generator)), side * low)
    codes = nearest_planes(weight, scales, 0)
    levels = torch.stack([plane_values(torch.full_like(codes, code), scales, 0) for code in range(4)], dim=-1)
    best = (levels - weight[..., None]).abs().amin(dim=-1)
    torch.testing.assert_close((plane_values(codes, scales, 0) - weight).abs(), best, rtol=0, atol=1e-6)
    # Halfway between levels -1, 0, 1 and 2.
    halves = nearest_planes(
        torch.tensor([[-0.5, 0.5, 1.5]]), PlaneScales(torch.tensor([[2.0]]), torch.tensor([[-1.0]])), 0
    )
    assert halves.tolist() == [[1, 3, 3]]


def test_scales_out_of_order_are_brought_back() -> None:
    high = torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0]])
    low = torch.tensor([[-2.0, 0.7, -0.5, 0.0, -1.0]])
    a1, a2 = guarded(high, low)
    # The second is that of a mirror image.
    side = torch.tensor([[1.0, -1.0, 1.0, 1.0, 1.0]])
    assert bool((side * a2 < 0).all() & (side * (a1 + a2) > 0).all())
    assert a1[0, 4] == 3.0
    assert a2[0, 4] == -1.0
    with pytest.raises(ConfigError, match="65504"):
        guarded(torch.tensor([[1e6]]), torch.tensor([[-1.0]]))


def test_best_pairs_are_those_of_least_squares_pulled_to_what_was_there() -> None:
    weight, hessian = weights(7, 24), damped(stats_of(24).hessian, 0.01)
    codes = nearest_planes(weight, _start(weight, 8), 8)
    first, second = (codes >> 1).double(), (codes & 1).double()
    ridge, prior = torch.rand(7, 6).double() * 0.1, torch.randn(7, 6).double()
    high, low = best_pairs(weight, first, second, hessian, 8, ridge, prior)
    root = torch.linalg.cholesky(hessian).T
    groups = torch.nn.functional.one_hot(torch.arange(24) // 8).double()
    for row in range(7):
        planes = torch.cat([groups * first[row, :, None], groups * second[row, :, None]], dim=1)
        pull = torch.diag(ridge[row].sqrt())
        wanted = torch.linalg.lstsq(
            torch.cat([root @ planes, pull]), torch.cat([root @ weight[row].double(), pull @ prior[row]])
        ).solution
        torch.testing.assert_close(torch.cat([high[row], low[row]]), wanted, rtol=1e-6, atol=1e-8)


def test_scales_that_are_solved_for_lose_less_and_empty_planes_keep_theirs() -> None:
    weight, hessian = weights(30, 128), damped(stats_of(128).hessian, 0.2)
    before = _start(weight, 64)
    codes = nearest_planes(weight, before, 64)
    codes[0, :64] = 0
    found = best_scales(weight, codes, before, hessian, 64)
    losses = [
        output_errors(plane_values(codes, scales, 64) - weight, hessian).mean() for scales in (before, found)
    ]
    assert float(losses[1]) < float(losses[0])
    assert found.high[0, 0] == before.high[0, 0]
    assert found.low[0, 0] == before.low[0, 0]


def _start(weight: torch.Tensor, group: int) -> PlaneScales:
    packed = DBLLM(group=group).pack(weight)
    assert packed.low_scales is not None
    return PlaneScales(packed.per_group(packed.scales).float(), packed.per_group(packed.low_scales).float())


def test_calibrated_planes_keep_outputs_better() -> None:
    weight, stats = weights(48, 192), stats_of(192)
    errors = [
        float(output_errors(format.pack(weight, stats).unpack() - weight, stats.hessian).sum())
        for format in (DBLLM(start="nearest"), DBLLM(), DBLLM(start="calibrated", rounds=1), DBLLM(start="calibrated"))
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[1]
    theirs = DecoupleQ(epochs=0).pack(weight, stats).unpack() - weight
    assert errors[-1] < 1.5 * float(output_errors(theirs, stats.hessian).sum())


def test_a_mirrored_matrix_is_kept_as_the_mirror_image() -> None:
    weight = weights(12, 128)
    assert torch.equal(DBLLM().pack(-weight).unpack(), -DBLLM().pack(weight).unpack())
    # Clipping does not move the mean of rows to one side, as it does where all groups reach farther up.
    weight = weights(64, 512)
    shifts = []
    for sides in ((1, -1), (1,)):
        scales = _clipped(weight, 64, _CLIPPING, sides)
        values = plane_values(nearest_planes(weight, scales, 64), scales, 64)
        shifts.append(abs(float((values - weight).mean())))
    assert shifts[0] < 0.2 * shifts[1]


def test_planes_are_sparse() -> None:
    packed = DBLLM().pack(weights(64, 256))
    codes = packed.code_rows()
    ones = float(((codes >> 1) + (codes & 1)).float().mean())
    # Normal weights: 0.8 additions a weight where a dense pair of planes needs 2.
    assert 0.6 < ones < 0.9


def test_only_calibrated_planes_ask_for_text() -> None:
    assert not DBLLM().needs
    assert DBLLM(start="calibrated").needs == {"hessian"}
    with pytest.raises(ConfigError, match="needs calibration text"):
        DBLLM(start="calibrated").pack(weights(4, 64))
    with pytest.raises(ConfigError, match="start"):
        FORMATS.parse("db-llm:start=far")
