"""Draws by Gumbel numbers: they have the law of drawing without replacement, also under a maximum."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from plait.claims.toy_laws import chi_square
from plait.decode.gumbel import conditioned_on_maximum, top

RARE = 1e-4


def without_replacement(law: np.ndarray, count: int) -> np.ndarray:
    """Exact law of ordered draws, (V,) * count."""
    out = np.zeros((len(law),) * count)
    for tokens in itertools.permutations(range(len(law)), count):
        mass, left = 1.0, 1.0
        for token in tokens:
            mass *= law[token] / left
            left -= law[token]
        out[tokens] = mass
    return out


def test_the_largest_are_draws_without_replacement_in_order() -> None:
    law = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    gumbel = np.random.default_rng(0).gumbel(size=(40_000, 5))
    draws = [tuple(top(np.log(law) + row, 3).tolist()) for row in gumbel]
    assert chi_square(draws, without_replacement(law, 3)) > RARE
    assert chi_square([tuple(sorted(draw)) for draw in draws], without_replacement(law, 3)) < RARE


@pytest.mark.parametrize("count", [0, 1, 3, 5, 9])
def test_top_is_a_stable_sort_without_what_is_impossible(count: int) -> None:
    values = np.array([2.0, -math.inf, 5.0, 2.0, 7.0])
    assert top(values, count).tolist() == [4, 2, 0, 3][:count]


def test_a_condition_on_the_maximum_keeps_order_and_gives_the_formula() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        perturbed = random.normal(size=6) * 3
        perturbed[random.integers(6)] = -math.inf
        maximum = float(random.normal() * 3)
        given = conditioned_on_maximum(perturbed, maximum)
        largest = perturbed.max()
        naive = -np.log(np.exp(-maximum) - np.exp(-largest) + np.exp(-perturbed))
        np.testing.assert_allclose(given, naive, atol=1e-9)
        assert given.max() == maximum
        assert np.argsort(given).tolist() == np.argsort(perturbed).tolist()


def test_conditioned_numbers_stay_finite_where_the_formula_overflows() -> None:
    given = conditioned_on_maximum(np.array([-800.0, -801.0, 500.0]), -900.0)
    assert np.isfinite(given).all()
    assert given[2] == -900.0
    assert given[0] >= given[1]


def test_a_tree_of_conditioned_numbers_draws_leaves_without_replacement() -> None:
    # Top-down conditioned numbers of a two-level tree against draws among all its leaves.
    random = np.random.default_rng(2)
    first = np.array([0.5, 0.3, 0.2])
    second = random.dirichlet(np.ones(3), size=3)
    leaves = (first[:, None] * second).ravel()
    draws = []
    for _ in range(20_000):
        upper = conditioned_on_maximum(np.log(first) + random.gumbel(size=3), 0.0)
        # The root's maximum is itself a Gumbel number; its value does not change which leaves come first.
        lower = [
            conditioned_on_maximum(np.log(leaves[3 * a : 3 * a + 3]) + random.gumbel(size=3), upper[a])
            for a in range(3)
        ]
        draws.append(tuple(top(np.concatenate(lower), 2).tolist()))
    assert chi_square(draws, without_replacement(leaves, 2)) > RARE
