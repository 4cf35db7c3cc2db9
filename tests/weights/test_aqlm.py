"""Calibration of vector codes: each of its steps against an independent form."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_coded import stats_of, weights

from plait.errors import ConfigError
from plait.weights import VQ
from plait.weights.aqlm import VectorCodes, best_books, best_codes, best_scales, calibrated
from plait.weights.gptq import damped


def problem(
    rows: int, columns: int, width: int, books: int, entries: int
) -> tuple[torch.Tensor, torch.Tensor, VectorCodes]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, entries, (rows * columns // width, books), generator=generator)
    given = VectorCodes(
        codes,
        0.05 * torch.randn(books, entries, width, generator=generator),
        0.5 + torch.rand(rows, generator=generator),
    )
    return weights(rows, columns), damped(stats_of(columns).hessian, 0.01), given


@pytest.mark.parametrize("books", [1, 2])
def test_best_books_are_those_of_least_squares(books: int) -> None:
    weight, hessian, given = problem(20, 16, 4, books, 5)
    found = best_books(weight, hessian, given)
    # Every entry's share of every weight, seen through the root of H.
    design = torch.zeros(20, 16, books, 5, 4, dtype=torch.float64)
    codes = given.codes.view(20, 4, books)
    for row, run, book, at in itertools.product(range(20), range(4), range(books), range(4)):
        design[row, 4 * run + at, book, codes[row, run, book], at] = given.scales[row]
    root = torch.linalg.cholesky(hessian).T
    seen = torch.einsum("ij,rjk->rik", root, design.flatten(2)).flatten(0, 1)
    goal = (weight.double() @ root.T).flatten()
    solved = torch.linalg.lstsq(seen, goal, driver="gelsd").solution
    best = float((seen @ solved - goal).square().sum())
    assert best * (1 - 1e-6) <= found.loss(weight, hessian) <= 1.02 * best
    assert given.loss(weight, hessian) > 1.5 * best


def test_best_scales_have_no_slope_left() -> None:
    weight, hessian, given = problem(20, 16, 4, 2, 5)
    found = best_scales(weight, hessian, given)
    for factor in (0.99, 1.01):
        assert found._replace(scales=factor * found.scales).loss(weight, hessian) > found.loss(
            weight, hessian
        )


def test_a_run_has_the_best_of_all_its_codes() -> None:
    weight, hessian, given = problem(30, 8, 8, 1, 40)
    found = best_codes(weight, hessian, given)
    losses = torch.stack(
        [given.scales[:, None] * entry - weight for entry in given.books[0]]
    ).double()  # (K, O, I)
    best = ((losses @ hessian) * losses).sum(dim=2).argmin(dim=0)
    assert torch.equal(found.codes[:, 0], best)


def test_no_step_and_no_round_raises_the_loss() -> None:
    weight, hessian, given = problem(24, 32, 4, 2, 16)
    losses = [given.loss(weight, hessian)]
    for step in (best_books, best_scales, best_codes, best_books, best_scales, best_codes):
        given = step(weight, hessian, given)
        losses.append(given.loss(weight, hessian))
    # Books and scales are rounded to fp16.
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(losses))
    assert losses[3] < 0.9 * losses[0]
    more = calibrated(weight, hessian, given, rounds=3)
    assert more.loss(weight, hessian) <= losses[-1]
    assert torch.equal(more.books, more.books.half().float())


def test_a_row_of_zeros_stays_one() -> None:
    weight = weights(64, 64)
    weight[5] = 0
    packed = VQ(group=4, start="calibrated", rounds=2).pack(weight, stats_of(64))
    assert bool((packed.unpack()[5] == 0).all())
    assert bool(torch.isfinite(packed.unpack()).all())


def test_only_calibrated_codes_ask_for_text() -> None:
    assert VQ().needs == frozenset()
    assert VQ(start="calibrated").needs == {"hessian"}
    with pytest.raises(ConfigError, match=r"start=calibrated.*calibration"):
        VQ(start="calibrated").pack(weights(64, 64))
