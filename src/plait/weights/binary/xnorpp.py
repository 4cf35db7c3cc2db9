"""XNOR-Net++: signs, and one learned scale of outputs for those of weights and inputs.

Source: Bulat and Tzimiropoulos 2019, arXiv:1909.13863, equation 6 (the rank-1 form, case 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from plait.errors import IncompatibleError
from plait.weights.binary.base import Binarizer, Place, Rule
from plait.weights.binary.signs import clip_sign

__all__ = ["XNORpp"]


class XNORppRule(Rule):
    """`sign(w)`, `sign(a)`, and outputs times scales of channels, rows and columns."""

    def __init__(self, place: Place, extent: int) -> None:
        super().__init__(place)
        self.channels = nn.Parameter(torch.ones(place.outputs))
        # Rows and columns of images only, which BiBench does too.
        self.places = nn.ParameterList(
            torch.ones(extent) for _ in range(place.dims if place.dims == 2 else 0)
        )

    def weights(self, w: Tensor) -> Tensor:
        return clip_sign(w)

    def inputs(self, a: Tensor) -> Tensor:
        return clip_sign(a)

    def outputs(self, y: Tensor) -> Tensor:
        y = y * self.place.along_channels(self.channels)
        for axis, scales in zip((-2, -1), self.places, strict=False):
            if y.shape[axis] > len(scales):
                raise IncompatibleError(
                    f"xnorpp learns scales of {len(scales)} rows and columns here. An output has"
                    f" {y.shape[axis]}; binarise with xnorpp:extent={y.shape[axis]} or more."
                )
            y = y * scales[: y.shape[axis]].view(-1, *[1] * (-1 - axis))
        return y


@dataclass(frozen=True, kw_only=True)
class XNORpp(Binarizer, name="xnorpp"):
    """Signs of weights and inputs, and outputs times scales that are learned.

    One scale for each output channel and, in 2-d convolutions, for each row and each column, all 1 at first.

    Args:
        extent: rows and columns of the largest output of a 2-d convolution.
    """

    extent: Annotated[int, Field(ge=1)] = 32

    def rule_at(self, place: Place) -> Rule:
        return XNORppRule(place, self.extent)
