"""Draws without replacement by adding Gumbel numbers to log-probabilities.

Sources: Kool et al. 2019, "Stochastic Beams and Where to Find Them", arXiv:1903.06059 (Gumbel-top-k, and
numbers conditioned on their maximum in section 4.1 and appendix B.3). Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from plait.decode.truncation import largest

__all__ = ["conditioned_on_maximum", "top"]

_Array = npt.NDArray[np.float64]


def top(values: _Array, count: int) -> npt.NDArray[np.int64]:
    """Indices of the `count` largest values, best first and lowest first among equals; -inf is left out.

    Of `log_law + gumbel`, (V,), they are draws without replacement in the order of drawing.
    """
    count = min(count, len(values))
    if count < 1:
        return np.zeros(0, dtype=np.int64)
    candidates = largest(values, count)
    best = candidates[np.argsort(-values[candidates], kind="stable")][:count]
    kept: npt.NDArray[np.int64] = best[values[best] > -math.inf]
    return kept


def conditioned_on_maximum(perturbed: _Array, maximum: float) -> _Array:
    """Shift Gumbel numbers, (V,), as if they had been drawn with this maximum; their order stays.

    `-log(exp(-maximum) - exp(-max(perturbed)) + exp(-perturbed))` in a form that does not cancel; entries
    of -inf stay, and the largest becomes exactly `maximum`.
    """
    largest = perturbed.max()
    with np.errstate(divide="ignore", invalid="ignore"):
        behind = perturbed - largest
        # log(1 - exp(behind)), which is -inf at the largest.
        gap = np.where(behind > -math.log(2), np.log(-np.expm1(behind)), np.log1p(-np.exp(behind)))
        offset = maximum - perturbed + gap
        shifted = maximum - np.maximum(0.0, offset) - np.log1p(np.exp(-np.abs(offset)))
    shifted[perturbed == -math.inf] = -math.inf
    shifted[perturbed == largest] = maximum
    return shifted
