"""GPTQ and decoupleQ against independent forms, and the promises of their steps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_coded import inputs, stats_of, weights

from plait.claims.weights import of_best_codes
from plait.errors import ConfigError
from plait.weights import GPTQ, DecoupleQ, Stats, Uniform
from plait.weights.decoupleq import best_levels, row_losses
from plait.weights.gptq import Moments, codes_with_feedback, damped
from plait.weights.uniform import Levels, nearest_levels


def hessian_of(columns: int, seed: int = 0) -> torch.Tensor:
    stats = Stats(columns)
    stats.add(inputs(columns, seed))
    return damped(stats.hessian, 0.01)


def test_stats_are_the_moments_of_all_rows() -> None:
    x = inputs(24)
    stats = Stats(24)
    for part in x.split([1, 99, 300]):
        stats.add(part)
    assert stats.tokens == 400
    torch.testing.assert_close(stats.hessian, (x.double().T @ x.double()) / 400, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.norm2, stats.hessian.diagonal(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.mean_abs, x.double().abs().mean(dim=0))
    factors = torch.rand(24) + 0.5
    other = Stats(24)
    other.add(x / factors)
    torch.testing.assert_close(stats.divided(factors).hessian, other.hessian, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="NaN"):
        stats.add(torch.full((1, 24), torch.nan))
    with pytest.raises(ConfigError, match="no calibration"):
        _ = Stats(3).norm2


def plain_gptq(weight: np.ndarray, levels: Levels, hessian: np.ndarray, bits: int, group: int) -> np.ndarray:
    """One row after the other; each step removes a column by the closed form of optimal brain surgery."""
    codes = np.zeros(weight.shape, np.uint8)
    scale, zero = levels.scale.double().numpy(), levels.zero.double().numpy()
    for row in range(weight.shape[0]):
        rest, inverse = weight[row].astype(np.float64), np.linalg.inv(hessian)
        for column in range(weight.shape[1]):
            s, z = scale[row, column // group], zero[row, column // group]
            code = min(max(np.floor(rest[column] / s + z + 0.5), 0), 2**bits - 1)
            codes[row, column] = code
            error = (rest[column] - s * (code - z)) / inverse[column, column]
            rest = rest - error * inverse[column]
            inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
            # The column is settled: nothing moves it any more.
            inverse[column, :] = inverse[:, column] = 0.0
            inverse[column, column] = 1.0
    return codes


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_equals_removing_one_column_at_a_time(bits: int) -> None:
    weight, hessian = weights(6, 40), hessian_of(40)
    levels = nearest_levels(weight, bits, 16, symmetric=False)
    codes = codes_with_feedback(weight, levels, Moments(hessian).feedback("natural"), bits, 16)
    assert torch.equal(codes, torch.from_numpy(plain_gptq(weight.numpy(), levels, hessian.numpy(), bits, 16)))


def test_columns_in_order_of_their_inputs_equal_a_permuted_matrix() -> None:
    weight, hessian = weights(5, 200), hessian_of(200)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    levels = nearest_levels(weight, 3, 0, symmetric=False)
    by_activation = codes_with_feedback(weight, levels, Moments(hessian).feedback(), 3, 0)
    natural = Moments(hessian[order][:, order]).feedback("natural")
    permuted = codes_with_feedback(weight[:, order], levels, natural, 3, 0)
    assert torch.equal(by_activation[:, order], permuted)


def test_gptq_keeps_outputs_better_than_rounding() -> None:
    weight, stats = weights(32, 192), stats_of(192)

    def error(packed: torch.Tensor) -> float:
        change = (packed - weight).double()
        return float(((change @ stats.hessian) * change).sum())

    rounded = error(Uniform(bits=3).pack(weight).unpack())
    assert error(GPTQ(bits=3).pack(weight, stats).unpack()) < 0.5 * rounded
    assert error(GPTQ(bits=3, symmetric=True).pack(weight, stats).unpack()) < rounded


def test_dead_inputs_and_little_text_still_work() -> None:
    x = inputs(64, rows=5)
    x[:, 10] = 0.0
    stats = Stats(64)
    stats.add(x)
    for format in (GPTQ(bits=4), DecoupleQ(bits=4, epochs=0)):
        unpacked = format.pack(weights(8, 64), stats).unpack()
        assert bool(torch.isfinite(unpacked).all())
        assert float((unpacked - weights(8, 64)).abs().max()) < 0.15


# decoupleQ: the float step.


@pytest.mark.parametrize("group", [0, 8, 5])
def test_best_levels_are_those_of_least_squares(group: int) -> None:
    weight, hessian = weights(7, 24).double().float(), hessian_of(24)
    codes = torch.randint(0, 4, (7, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    levels = best_levels(weight, codes, hessian, group)
    root = np.linalg.cholesky(hessian.numpy()).T
    size = group or 24
    for row in range(7):
        groups = np.arange(24) // size
        onehot = np.eye(groups.max() + 1)[groups]
        matrix = np.concatenate([onehot * codes[row].numpy()[:, None], onehot], axis=1)
        found, *_ = np.linalg.lstsq(root @ matrix, root @ weight[row].double().numpy(), rcond=None)
        scale = levels.scale[row].double().numpy()
        mine = np.concatenate([scale, -scale * levels.zero[row].double().numpy()])
        np.testing.assert_allclose(mine, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group", [0, 8])
def test_best_levels_have_no_slope_left(group: int) -> None:
    weight, hessian = weights(7, 24), hessian_of(24)
    codes = torch.randint(0, 4, (7, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))

    def slopes(levels: Levels) -> torch.Tensor:
        sizes = torch.tensor([group or 24] * (24 // (group or 24)))
        scale, shift = (
            numbers.double().requires_grad_() for numbers in (levels.scale, -levels.scale * levels.zero)
        )
        spread = [numbers.repeat_interleave(sizes, dim=1) for numbers in (scale, shift)]
        change = spread[0] * codes.double() + spread[1] - weight.double()
        ((change @ hessian) * change).sum().backward()
        assert scale.grad is not None
        assert shift.grad is not None
        return torch.cat([scale.grad, shift.grad]).norm()

    best = best_levels(weight, codes, hessian, group)
    # Levels are returned in fp32.
    assert float(slopes(best)) <= 1e-5 * float(slopes(Levels(2 * best.scale, best.zero)))


def test_one_round_has_the_codes_of_gptq() -> None:
    weight, stats = weights(20, 128), stats_of(128)
    mine, theirs = (f.pack(weight, stats) for f in (DecoupleQ(rounds=1, epochs=0), GPTQ(bits=2)))
    assert torch.equal(mine.code_rows(), theirs.code_rows())


def test_groups_whose_codes_are_equal_have_levels_too() -> None:
    weight, hessian = weights(3, 32), hessian_of(32)
    codes = torch.randint(0, 4, (3, 32), dtype=torch.uint8)
    codes[1, 8:16] = 2
    codes[2] = 0
    levels = best_levels(weight, codes, hessian, 8)
    assert bool(torch.isfinite(levels.scale).all() & torch.isfinite(levels.zero).all())
    assert float(levels.zero.abs().max()) < 65504
    losses = row_losses(weight, codes, levels, hessian, 8)
    # The best constant for a row of equal codes.
    plain = float(weight[2].double() @ hessian @ weight[2].double())
    assert float(losses[2]) < plain


def test_no_row_gets_worse_in_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    kept = DecoupleQ._kept

    def watched(self: DecoupleQ, *arguments: object) -> object:
        result = kept(self, *arguments)  # type: ignore[arg-type]
        seen.append(result[2])
        return result

    monkeypatch.setattr(DecoupleQ, "_kept", watched)
    DecoupleQ(rounds=4, epochs=0).pack(weights(24, 128), stats_of(128))
    assert len(seen) >= 4
    assert all(bool((later <= earlier).all()) for earlier, later in itertools.pairwise(seen))


def test_a_row_that_lies_on_a_grid_is_recovered() -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 4, (64, 64), generator=generator)
    scale, zero = (
        torch.rand(64, 1, generator=generator) * 0.1 + 0.05,
        1 + torch.rand(64, 1, generator=generator),
    )
    weight = scale * (codes - zero)
    hessian = hessian_of(64)
    shake = 2 * torch.rand(2, 64, 1, generator=generator) - 1
    levels = Levels(scale * (1 + 0.04 * shake[0]), zero + 0.1 * shake[1])
    for _ in range(4):
        found = codes_with_feedback(weight, levels, Moments(hessian).feedback(), 2, 0)
        levels = best_levels(weight, found, hessian, 0)
    sizes = ((weight.double() @ hessian) * weight.double()).sum(dim=1)
    losses = row_losses(weight, found, levels, hessian, 0)
    assert float((losses < 1e-10 * sizes).float().mean()) >= 0.95


def test_short_rows_come_near_the_best_of_all_codes() -> None:
    columns, rows = 6, 200
    stats = Stats(columns)
    stats.add(inputs(columns, 7))
    ratios = of_best_codes(DecoupleQ(group=0, epochs=0, rounds=10), weights(rows, columns, seed=6), stats)
    # Half of the rows; the mean over rows, which misses that bar, is in the claim "decoupleq".
    assert np.median(ratios) <= 1.25


def test_decoupleq_beats_gptq_which_beats_rounding_at_two_bits() -> None:
    weight, stats = weights(48, 192), stats_of(192)
    errors = []
    for format in (Uniform(bits=2), GPTQ(bits=2), DecoupleQ(epochs=0)):
        change = (format.pack(weight, stats).unpack() - weight).double()
        errors.append(float(((change @ stats.hessian) * change).sum()))
    assert errors[2] < 0.75 * errors[1] < 0.75 * errors[0]
