"""DoReFa with one bit: signs of weights times their mean size, signs of inputs.

Source: Zhou et al. 2016, arXiv:1606.06160, section 2.3; the scale is one of each output, as BiBench has it (the paper: of
a layer).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plait.weights.binary.base import Binarizer, Rule
from plait.weights.binary.signs import clip_sign

__all__ = ["DoReFa", "mean_size"]


def mean_size(w: Tensor) -> Tensor:
    """The mean size of each row of w (O, I), (O,); no gradient flows through it."""
    return w.detach().abs().mean(dim=1)


class DoReFaRule(Rule):
    """`mean|w| sign(w)`, `sign(a)`."""

    def weights(self, w: Tensor) -> Tensor:
        return clip_sign(w)

    def scale(self, w: Tensor) -> Tensor:
        return mean_size(w)

    def inputs(self, a: Tensor) -> Tensor:
        return clip_sign(a)


@dataclass(frozen=True, kw_only=True)
class DoReFa(Binarizer, name="dorefa"):
    """Signs of weights times the mean size of their row, signs of inputs.

    Gradients pass where a number is within [-1, 1].
    """

    rule = DoReFaRule
