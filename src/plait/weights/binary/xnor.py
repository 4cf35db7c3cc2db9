"""XNOR-Net: signs times mean sizes, of weights and of inputs.

Source: Rastegari et al. 2016, arXiv:1603.05279, equations 6 and 10; centred weights in linear layers and one size for
each input, as BiBench has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plait.weights.binary.base import Binarizer, Rule
from plait.weights.binary.dorefa import mean_size
from plait.weights.binary.signs import clip_sign

__all__ = ["XNOR"]


class XNORRule(Rule):
    """`mean|w| sign(w)` of centred rows, `mean|a| sign(a)`."""

    def weights(self, w: Tensor) -> Tensor:
        return clip_sign(self._centred(w))

    def scale(self, w: Tensor) -> Tensor:
        return mean_size(self._centred(w))

    def inputs(self, a: Tensor) -> Tensor:
        return clip_sign(a)

    def input_size(self, a: Tensor) -> Tensor:
        return a.abs().mean(dim=self.place.sample_axes, keepdim=True)

    def _centred(self, w: Tensor) -> Tensor:
        return w - w.mean(dim=1, keepdim=True) if self.place.dims == 0 else w


@dataclass(frozen=True, kw_only=True)
class XNOR(Binarizer, name="xnor"):
    """Signs of weights times the mean size of their row, signs of inputs times the mean size of the input.

    The size of an input, of a token in linear layers and of a sample in convolutions, takes a pass over plain numbers.
    """

    rule = XNORRule
