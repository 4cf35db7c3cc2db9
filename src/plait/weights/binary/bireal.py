"""Bi-Real: the gradient of the inputs' sign is that of two parabolas near it.

Source: Liu et al. 2018, arXiv:1808.00278, equation 7. Its shortcuts belong to a network, not to a layer, and are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plait.weights.binary.base import Binarizer, Rule
from plait.weights.binary.dorefa import mean_size
from plait.weights.binary.signs import approx_sign, clip_sign

__all__ = ["BiReal", "BiRealRule"]


class BiRealRule(Rule):
    """`mean|w| sign(w)`, `sign(a)` with the gradient of ApproxSign."""

    def weights(self, w: Tensor) -> Tensor:
        return clip_sign(w)

    def scale(self, w: Tensor) -> Tensor:
        return mean_size(w)

    def inputs(self, a: Tensor) -> Tensor:
        return approx_sign(a)


@dataclass(frozen=True, kw_only=True)
class BiReal(Binarizer, name="bireal"):
    """Signs of weights times the mean size of their row, signs of inputs with gradients that fall off from 0.

    An input passes 2 - 2|a| of its gradient within [-1, 1].
    """

    rule = BiRealRule
