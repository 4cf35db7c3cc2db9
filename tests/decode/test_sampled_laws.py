"""Every speculator keeps the law of sampled text, and the same test notices what would break it.

A few hundred texts each; the claim `lossless-draft` draws 200,000.
"""

from __future__ import annotations

import numpy as np
import pytest

from plait.claims.sampled_laws import MISTAKES, SIZE, SPECULATORS, fit, fits, law
from plait.claims.toy_laws import chi_square_of
from plait.decode.speculate import SPECULATORS as AXIS

# Texts of each test, and the chance that a right speculator fails one.
FEW, RARE = 400, 1e-4


def test_every_method_that_guesses_is_held_to_the_law() -> None:
    assert set(AXIS.names()) - {"none"} <= set(SPECULATORS)


@pytest.mark.parametrize("name", SPECULATORS)
def test_text_has_the_law_of_the_model(name: str) -> None:
    assert fit(name, FEW) > RARE


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str) -> None:
    assert fit(name, 3 * FEW) < RARE


def test_pieces_of_several_processes_are_the_same_texts() -> None:
    ((name, found),) = fits({"chain": 300}, 1, piece=170)
    assert (name, found) == ("chain", fit("chain", 300))
    assert 0 < found < 1


def test_the_law_is_one_and_never_says_the_placeholder() -> None:
    exact = law()
    assert exact.sum() == pytest.approx(1)
    assert exact[SIZE - 1].sum() == 0
    counts = np.zeros_like(exact)
    counts[SIZE - 1, 0, 0] = 1
    assert chi_square_of(counts, exact) == 0
