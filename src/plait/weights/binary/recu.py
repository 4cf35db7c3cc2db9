"""ReCU: weights that are far out are brought back, so that they can change their sign again.

Source: Xu et al. 2021, arXiv:2103.12369, equations 6 to 9 and section 3.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.weights.binary.base import Binarizer, Place, Rule
from plait.weights.binary.signs import approx_sign, plain_sign

__all__ = ["ReCU"]

_FIRST, _LAST = 0.85, 0.99  # of tau
_TINY = 1e-5


class ReCURule(Rule):
    """`sign` of rows that are centred, standardised and clamped to a quantile; outputs times a learned scale."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.tau = _FIRST
        self.alpha = nn.Parameter(torch.rand(place.outputs))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        rise = (_LAST - _FIRST) / (math.e - 1)
        self.tau = rise * math.exp(epoch / epochs) + _FIRST - rise

    def weights(self, w: Tensor) -> Tensor:
        w = w - w.mean(dim=1, keepdim=True)
        w = w * (2 * math.sqrt(2)) / _deviation(w, (1,))
        # The quantile tau of a Laplace distribution of this mean size.
        limit = -float(w.detach().abs().mean()) * math.log(2 - 2 * self.tau)
        return plain_sign(w.clamp(-limit, limit))

    def inputs(self, a: Tensor) -> Tensor:
        # No sign changes by this, only who gets gradients.
        return approx_sign(a / _deviation(a, self.place.sample_axes) if self.training else a)

    def outputs(self, y: Tensor) -> Tensor:
        return y * self.place.along_channels(self.alpha)


@dataclass(frozen=True, kw_only=True)
class ReCU(Binarizer, name="recu"):
    """Signs of standardised weights, of which the outermost are brought back to a quantile; learned scales of outputs.

    The quantile rises from 0.85 in the first epoch towards 0.99, so epochs must be told.
    """

    rule = ReCURule


def _deviation(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Standard deviation over axes, which stay; of a single number it is next to 0."""
    count = math.prod(x.shape[axis] for axis in axes)
    return (x.var(dim=axes, keepdim=True, correction=min(1, count - 1)) + _TINY).sqrt()
