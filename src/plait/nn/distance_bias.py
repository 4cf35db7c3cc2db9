"""Biases of attention by distance as data; `plait.ops.distance_bias` has the formulas and their sources."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from plait.ops.distance_bias import DistanceBias, Schedule, alibi_slopes, harmonic_slopes
from plait.spec import Axis, Spec

__all__ = ["BIASES", "DistanceBiasConfig", "Harmonic", "Linear", "bias_of"]

BIASES = Axis("distance bias")


@dataclass(frozen=True, kw_only=True)
class DistanceBiasConfig(Spec, axis=BIASES):
    """What attention takes off a score by how far the key stands from the query.

    Head h of H scores `product * scale * q . k - weight * m_h * f(distance)`.

    Args:
        slopes: m_h. `alibi` is 2^(-8h/H), with ALiBi's interpolation where H is not a power of two; `harmonic` is 1/h.
        weight: factor on every slope; 0 is attention without a bias.
        product: factor on the product of query and key, which is rotated where the model has rotary positions.
        limit: larger distances count as this one; None for no limit.
    """

    # How the operations call f.
    schedule: ClassVar[Schedule]

    slopes: Literal["alibi", "harmonic"] = "alibi"
    weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    product: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    limit: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class Harmonic(DistanceBiasConfig, name="harmonic"):
    """The harmonic number of the distance: weights fall as a power of it. After Li 2024, arXiv:2410.18441.

    H(n) grows like the logarithm of n, so its slopes must be steeper than those of ALiBi: with them a model of 4 heads
    read on hardly further than without a bias. Those here are 4/h.
    """

    schedule: ClassVar[Schedule] = "harmonic"

    slopes: Literal["alibi", "harmonic"] = "harmonic"
    weight: Annotated[float, Field(ge=0, le=1e6)] = 4.0


@dataclass(frozen=True, kw_only=True)
class Linear(DistanceBiasConfig, name="linear"):
    """The distance itself, as in ALiBi: weights fall exponentially. Press et al. 2021, arXiv:2108.12409."""

    schedule: ClassVar[Schedule] = "linear"


@cache
def bias_of(config: DistanceBiasConfig, num_heads: int) -> DistanceBias | None:
    """The bias of a layer; None where it is 0 at every distance. Made once for each config and number of heads."""
    if config.weight == 0:
        return None
    slopes = {"alibi": alibi_slopes, "harmonic": harmonic_slopes}[config.slopes](num_heads)
    with torch.inference_mode(False):
        weighted = torch.tensor([config.weight * slope for slope in slopes])
    return DistanceBias(weighted, config.schedule, config.limit)
