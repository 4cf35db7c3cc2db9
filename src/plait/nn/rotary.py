"""Rotary positions of a layer as data, and the scalings that stretch them to longer contexts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from plait.ops import Rope
from plait.spec import Axis, Spec

__all__ = ["SCALINGS", "RopeConfig", "RopeScaling", "base_frequencies", "rope_of"]

SCALINGS = Axis("rotary scaling")


class RopeScaling(Spec, axis=SCALINGS):
    """A change of the turning speeds that lets a model read further than it was first trained for."""

    def rope(self, theta: float, dim: int) -> Rope:
        """The speeds of `dim` rotated channels with base `theta`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RopeConfig(Spec):
    """Rotary positions of a layer.

    Args:
        theta: base of the geometric series of turning speeds.
        dim: number of rotated channels of a head.
        scaling: how the speeds are stretched, or None.
        angles: precision of position times speed. `fp64` keeps frames exact; `fp32` repeats the
            rounding of Hugging Face Transformers, which shows from about a thousand tokens on.
    """

    theta: Annotated[float, Field(gt=0)] = 10000.0
    dim: Annotated[int, Field(ge=2, multiple_of=2)]
    scaling: RopeScaling | None = None
    angles: Literal["fp64", "fp32"] = "fp64"


def base_frequencies(theta: float, dim: int) -> Tensor:
    """Unscaled turning speeds in radians per position, (dim / 2,) fp32."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


@cache
def rope_of(config: RopeConfig) -> Rope:
    """The turning speeds of a configuration; layers with equal configurations share them."""
    if config.scaling is None:
        rope = Rope(base_frequencies(config.theta, config.dim))
    else:
        rope = config.scaling.rope(config.theta, config.dim)
    return replace(rope, dtype=torch.float64 if config.angles == "fp64" else torch.float32)
