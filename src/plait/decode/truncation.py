"""Which tokens of a law are kept: top-k, nucleus (top-p) and min-p.

Shapes: V vocabulary. A mask of kept tokens is an increasing int64 array of ids. Every rule keeps the
likeliest token. None sorts the vocabulary unless the law is so flat that top-p needs most of it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["kept_tokens", "largest"]

# Most nuclei are smaller; a larger one is looked for in sets that grow by the factor.
_FIRST_CANDIDATES = 256
_CANDIDATE_GROWTH = 16


def kept_tokens(
    scores: npt.NDArray[np.floating[Any]], *, top_k: int, top_p: float, min_p: float
) -> npt.NDArray[np.int64] | None:
    """The ids that survive top-k, then top-p of what is left, then min-p; None when all do.

    Args:
        scores: log-probabilities up to a constant, (V,), with largest value 0.
        top_k: keep the k largest, and what ties with the last of them; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities sum to at least this (Holtzman et al.
            2020, arXiv:1904.09751); tokens of equal score go in by lowest id first; 1 keeps all.
        min_p: keep what has at least this fraction of the largest probability (Nguyen et al. 2024,
            arXiv:2407.01082); 0 keeps all.
    """
    ids: npt.NDArray[np.int64] | None = None
    if 0 < top_k < len(scores):
        ids = largest(scores, top_k)
    if top_p < 1:
        ids = _among(ids, _nucleus(np.exp(scores if ids is None else scores[ids]), top_p))
    if min_p > 0:
        ids = _among(ids, np.flatnonzero((scores if ids is None else scores[ids]) >= math.log(min_p)))
    return ids


def largest(values: npt.NDArray[np.floating[Any]], count: int) -> npt.NDArray[np.int64]:
    """Ids of the `count` largest values and of all that tie with the last of them, in increasing order.

    `count` is in [1, V]. Linear time.
    """
    rank = len(values) - count
    return np.flatnonzero(values >= np.partition(values, rank)[rank])


def _among(ids: npt.NDArray[np.int64] | None, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return chosen if ids is None else ids[chosen]


def _nucleus(weights: npt.NDArray[np.floating[Any]], top_p: float) -> npt.NDArray[np.int64]:
    target = top_p * float(weights.sum(dtype=np.float64))
    count = min(_FIRST_CANDIDATES, len(weights))
    while True:
        candidates = largest(weights, count)
        # What underflowed to 0 ties by the thousand and adds nothing.
        candidates = candidates[weights[candidates] > 0]
        order = candidates[np.argsort(-weights[candidates], kind="stable")]
        mass = np.cumsum(weights[order], dtype=np.float64)
        if mass[-1] >= target or count == len(weights):
            break
        count = min(count * _CANDIDATE_GROWTH, len(weights))
    # A token is kept while those before it have not reached the target.
    return np.sort(order[: int(np.searchsorted(mass, target, side="left")) + 1])
