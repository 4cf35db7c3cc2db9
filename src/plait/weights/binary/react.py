"""ReAct: the threshold of each input channel is learned.

Source: Liu et al. 2020, arXiv:2003.03488, equation 1 (RSign). RPReLU belongs to a network, not to a layer, and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.weights.binary.base import Binarizer, Place
from plait.weights.binary.bireal import BiRealRule
from plait.weights.binary.signs import approx_sign

__all__ = ["ReAct"]


class ReActRule(BiRealRule):
    """`mean|w| sign(w)`, `sign(a + t)` with t learned for each input channel, from 0 on."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.threshold = nn.Parameter(torch.zeros(place.inputs))

    def inputs(self, a: Tensor) -> Tensor:
        return approx_sign(a + self.place.along_channels(self.threshold))

    def shift(self) -> Tensor:
        return self.threshold


@dataclass(frozen=True, kw_only=True)
class ReAct(Binarizer, name="react"):
    """Like bireal, but what counts as positive is learned for each input channel.

    Costs one number for each input channel.
    """

    rule = ReActRule
