"""BNN: signs of weights and inputs, and nothing else.

Source: Hubara et al. 2016, arXiv:1602.02830, equations 1 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plait.weights.binary.base import Binarizer, Rule
from plait.weights.binary.signs import clip_sign

__all__ = ["BNN"]


class BNNRule(Rule):
    """`sign(w)`, `sign(a)`."""

    def weights(self, w: Tensor) -> Tensor:
        return clip_sign(w)

    def inputs(self, a: Tensor) -> Tensor:
        return clip_sign(a)


@dataclass(frozen=True, kw_only=True)
class BNN(Binarizer, name="bnn"):
    """Signs of weights and inputs without any scale; a norm must follow, or outputs are large.

    Gradients pass where a number is within [-1, 1].
    """

    rule = BNNRule
