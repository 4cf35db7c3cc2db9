"""FDA: the gradient of the sign is that of its Fourier series, and a small network learns what the series lacks.

Source: Xu et al. 2021, arXiv:2103.00841, equations 5 to 8; schedules as in BiBench.
Shapes: d columns of a row or channels of an input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.errors import IncompatibleError
from plait.weights.binary.base import Binarizer, Place, Rule
from plait.weights.binary.dorefa import mean_size
from plait.weights.binary.signs import sloped_sign

__all__ = ["FDA", "fourier_sign"]

_FREQUENCY = 0.1
_FIRST_TERMS = 9
_NARROWING = 64


def fourier_sign(x: Tensor, last: int) -> Tensor:
    """The sign; within [-1, 1] gradients are those of terms 0 to `last` of a square wave's series, else 0."""
    v = _FREQUENCY * x.detach()
    slope = torch.zeros_like(v)
    for term in range(last + 1):
        slope += torch.cos((2 * term + 1) * v)
    inside = x.detach().abs() <= 1
    return sloped_sign(x, 4 * _FREQUENCY / math.pi * slope * inside)


class NoiseAdapter(nn.Module):
    """`W2 relu(W1 v) + 0.1 sin(v)` over the last axis, d numbers through d / 64."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.down = nn.Linear(d, max(1, d // _NARROWING), bias=False)
        self.up = nn.Linear(max(1, d // _NARROWING), d, bias=False)

    def forward(self, v: Tensor) -> Tensor:
        found: Tensor = self.up(torch.relu(self.down(v))) + 0.1 * torch.sin(v)
        return found


class FDARule(Rule):
    """`mean|w| (sign(w) + alpha eta(w))`, `sign(a) + alpha eta(a)`; alpha ends at 0."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.alpha, self.last = 0.1, _FIRST_TERMS
        self.of_weights: NoiseAdapter | None = NoiseAdapter(place.columns)
        self.of_inputs: NoiseAdapter | None = NoiseAdapter(place.inputs)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        self.alpha = 0.05 * (1 + math.cos(math.pi * (epoch + 1) / epochs))
        self.last = _FIRST_TERMS + int(epoch / epochs * _FIRST_TERMS)

    def weights(self, w: Tensor) -> Tensor:
        signs = fourier_sign(w, self.last)
        if self.alpha and self.of_weights is not None:
            signs = signs + self.alpha * self.of_weights(w)
        return signs

    def scale(self, w: Tensor) -> Tensor:
        return mean_size(w)

    def inputs(self, a: Tensor) -> Tensor:
        signs = fourier_sign(a, self.last)
        if self.alpha and self.of_inputs is not None:
            axis = self.place.channel_axis
            signs = signs + self.alpha * self.of_inputs(a.movedim(axis, -1)).movedim(-1, axis)
        return signs

    def finish(self) -> None:
        if self.alpha:
            raise IncompatibleError(
                f"fda still adds {self.alpha:.3g} of a noise adapter, which is not one bit. Train to the last epoch,"
                " and tell it of each with begin_epoch."
            )
        self.of_weights = self.of_inputs = None


@dataclass(frozen=True, kw_only=True)
class FDA(Binarizer, name="fda"):
    """Signs of weights times the mean size of their row, signs of inputs, with gradients of a Fourier series.

    While it trains, small networks add to weights and inputs what the series lacks, less with every epoch and nothing in the
    last, so epochs must be told. They cost 6% of a square layer's numbers in training and nothing afterwards.
    """

    rule = FDARule
