"""DB-LLM: two binary planes with a scale each, so that the four levels of two bits need not be evenly spaced.

Paper: Chen et al. 2024, "DB-LLM: Accurate Dual-Binarization for Efficient LLMs", Findings of ACL 2024,
arXiv:2402.11960, section 3.1 (flexible dual binarization). A weight of a group is stored as

    w = a1 b1 + a2 b2,   b1 = [w >= (a1 + a2) / 2],   b2 = [w - a1 b1 <= a2 / 2],

with b1 and b2 in {0, 1} and a1 > 0 > a2, a1 + a2 > 0; so the levels are a2 < 0 < a1 + a2 < a1, and b1 and b2 choose the
nearest. The scales start at a1 = 2 s and a2 = -s, where s is that of ordinary levels s {-1, 0, 1, 2}; tuning moves
them apart (`plait train weights`, with the paper's loss `--objective dad`).

Two things are ours. A group whose long side is the negative one may have both scales negated, which the storage allows: if
all groups reached farther up than down, clipping would move the mean of every row up. And planes and scales may be chosen
in turns with the second moments of the inputs, as decoupleQ does for evenly spaced levels.

Shapes: O output rows, I input columns, G groups of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.weights.coded import GRIDS, Coded, from_groups, group_sizes, grouped, half
from plait.weights.decoupleq import best_pairs, output_errors
from plait.weights.format import WeightFormat, check_matrix
from plait.weights.gptq import Moments, moments, with_feedback
from plait.weights.stats import Stats
from plait.weights.uniform import Group, coded_bits

__all__ = ["DBLLM", "PlaneScales", "guarded", "nearest_planes"]

# The smallest number of fp16: scales are at least this far from 0, and from each other.
_LEAST = 2.0**-24
_CLIPPING = (1.0, *(1 - i / 20 for i in range(1, 16)))
# Weight of the scales that were there before, relative to the mean of the system's diagonal: decides where a plane is empty.
_RIDGE = 1e-4


class PlaneScales(NamedTuple):
    """The scales of each group: a1 of the high bits, a2 of the low ones; fp32 (O, G) of numbers that fp16 holds."""

    high: Tensor
    low: Tensor


@dataclass(frozen=True, kw_only=True)
class DBLLM(WeightFormat, name="db-llm"):
    """Two bits a weight as two sparse planes of zeros and ones, each with a scale of its own in every group.

    One of the four levels is 0, and the two scales are free, so that tuning can do more with a group than with an
    evenly spaced grid of the same bytes. Kept: 2 bits for each weight and 32 for each group. As it starts it is
    an ordinary 2-bit grid, which is useless on small models unless it is calibrated or tuned. A product reads the
    codes once and multiplies both planes, which takes twice the work of an evenly spaced 2-bit grid.

    Args:
        group: columns that share both scales; 0 for the whole row. The last group of a row may be shorter.
        start: how planes and scales are found: `nearest` takes the extremes of each group, `search` the clipping of
            them with the least squared error, `calibrated` planes and scales in turns so that outputs are kept, which
            needs calibration text.
        rounds: how often planes are chosen, where calibrated.
        damping: share of the mean of the second moments that is added to each, in (0, 1], where calibrated.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix of finite numbers, or no `hessian` where calibrated.
    """

    group: Group = 64
    start: Literal["nearest", "search", "calibrated"] = "search"
    rounds: Annotated[int, Field(ge=1, le=100)] = 4
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01

    packs_embeddings = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"}) if self.start == "calibrated" else frozenset()

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return coded_bits(shape, 2, self.group, per_group=32)

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Coded:
        check_matrix(self.name, weight)
        weight = weight.detach().float()
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{self.name} packs finite weights. The weight has NaN or infinite values.")
        is_plain = self.start == "nearest"
        scales = _clipped(
            weight, self.group, (1.0,) if is_plain else _CLIPPING, (1,) if is_plain else (1, -1)
        )
        if self.start != "calibrated":
            return packed_planes(nearest_planes(weight, scales, self.group), scales, self.group)
        inputs = moments(f"{self} (start=calibrated)", stats, self.damping)
        hessian = inputs.hessian
        codes = self._chosen(weight, scales, inputs)
        loss = output_errors(plane_values(codes, scales, self.group) - weight, hessian)
        for number in range(self.rounds):
            if number:
                found = self._chosen(weight, scales, inputs)
                codes, scales, loss = self._kept(weight, hessian, (codes, scales, loss), (found, scales))
            solved = best_scales(weight, codes, scales, hessian, self.group)
            codes, scales, loss = self._kept(weight, hessian, (codes, scales, loss), (codes, solved))
        return packed_planes(codes, scales, self.group)

    def _chosen(self, weight: Tensor, scales: PlaneScales, inputs: Moments) -> Tensor:
        """Planes with the error of each column made up for by later ones."""
        size = self.group or max(1, weight.shape[1])
        high, low = scales.high.t().contiguous(), scales.low.t().contiguous()

        def nearest(column: int, rest: Tensor) -> tuple[Tensor, Tensor]:
            a1, a2 = high[column // size], low[column // size]
            b1, b2 = _planes(rest, a1, a2)
            return 2 * b1.to(torch.uint8) + b2.to(torch.uint8), b1 * a1 + b2 * a2

        return with_feedback(weight, inputs.feedback(), nearest)

    def _kept(
        self,
        weight: Tensor,
        hessian: Tensor,
        old: tuple[Tensor, PlaneScales, Tensor],
        new: tuple[Tensor, PlaneScales],
    ) -> tuple[Tensor, PlaneScales, Tensor]:
        """The better of two solutions for each row, and its loss."""
        loss = output_errors(plane_values(*new, self.group) - weight, hessian)
        is_better = loss < old[2]
        codes = torch.where(is_better[:, None], new[0], old[0])
        high, low = (
            torch.where(is_better[:, None], after, before)
            for after, before in zip(new[1], old[1], strict=True)
        )
        return codes, PlaneScales(high, low), torch.where(is_better, loss, old[2])


def guarded(high: Tensor, low: Tensor) -> PlaneScales:
    """The nearest scales in fp16 whose levels are in order: a2 < 0 < a1 + a2, or the mirror image of that.

    Raises:
        ConfigError: one is above what fp16 holds, or not finite.
    """
    side = torch.where(high < low, -1.0, 1.0)
    low = half((side * low).clamp(max=-_LEAST), "Scales").float()
    high = half(torch.maximum(side * high, _LEAST - low), "Scales").float()
    # Rounding may have brought a1 down to -a2; the next larger number of fp16 is at most 1/512 away.
    high = torch.where(high + low <= 0, half(-low * (1 + 2.0**-9) + _LEAST, "Scales").float(), high)
    return PlaneScales(side * high, side * low)


def nearest_planes(weight: Tensor, scales: PlaneScales, group: int) -> Tensor:
    """The codes `2 b1 + b2` of the nearest levels, uint8 (O, I); ties go to ones."""
    b1, b2 = _planes(weight, *(_spread(numbers, weight.shape[1], group) for numbers in scales))
    return 2 * b1.to(torch.uint8) + b2.to(torch.uint8)


def plane_values(codes: Tensor, scales: PlaneScales, group: int) -> Tensor:
    """What codes stand for, fp32 (O, I)."""
    high, low = (_spread(numbers, codes.shape[1], group) for numbers in scales)
    return torch.where(codes > 1, high, 0.0) + torch.where(codes & 1 > 0, low, 0.0)


def packed_planes(codes: Tensor, scales: PlaneScales, group: int) -> Coded:
    """Codes and scales as a matrix."""
    return from_groups(
        GRIDS["planes"], group, codes, half(scales.high, "Scales"), low_scales=half(scales.low, "Scales")
    )


def best_scales(
    weight: Tensor, codes: Tensor, before: PlaneScales, hessian: Tensor, group: int
) -> PlaneScales:
    """The scales with the least loss for given planes, in closed form, moved to where the levels are in order.

    Args:
        weight: (O, I).
        codes: uint8 (O, I).
        before: scales of groups that have an empty plane, and start of the guard.
        hessian: damped, (I, I) fp64.
    """
    prior = torch.cat([before.high, before.low], dim=1)
    ridge = _RIDGE * hessian.diagonal().mean().clamp(min=1e-30)
    high, low = best_pairs(
        weight, codes >> 1, codes & 1, hessian, group, ridge.expand(prior.shape).clone(), prior
    )
    return guarded(high.float(), low.float())


def _planes(w: Tensor, a1: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """b1 and b2 of weights whose scales have their shape."""
    side = torch.where(a1 < a2, -1.0, 1.0)
    b1 = side * (w - (a1 + a2) / 2) >= 0
    b2 = -side * (w - torch.where(b1, a1, 0.0) - a2 / 2) >= 0
    return b1, b2


def _clipped(weight: Tensor, group: int, factors: Sequence[float], sides: Sequence[int]) -> PlaneScales:
    """Scales 2 s and -s of each group, by the share of its extremes, and the side, that have the least squared error."""
    found = []
    for part in grouped(weight, group):
        least = torch.full(part.shape[:2], torch.inf)
        best = torch.zeros(part.shape[:2])
        for side, factor in itertools.product(sides, factors):
            # s {-1, 0, 1, 2} reaches both ends of the group, or of its mirror image.
            full = torch.maximum((side * part).amax(dim=2) / 2, (-side * part).amax(dim=2))
            s = side * half((full * factor).clamp(min=_LEAST), "Scales").float()
            b1, b2 = _planes(part, 2 * s[..., None], -s[..., None])
            error = ((2 * b1.float() - b2.float()) * s[..., None] - part).square().sum(dim=2)
            best = torch.where(error < least, s, best)
            least = torch.minimum(error, least)
        found.append(best)
    s = torch.cat(found, dim=1)
    return guarded(2 * s, -s)


def _spread(numbers: Tensor, columns: int, group: int) -> Tensor:
    """A number of each group for each of its columns: (O, G) -> (O, I)."""
    return numbers.repeat_interleave(torch.tensor(group_sizes(columns, group)), dim=1)
