"""BitMoD: every group of weights chooses one of four small floating-point grids.

Paper: Chen et al. 2025, "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration", HPCA 2025,
arXiv:2411.11745, section 3.

A basic floating-point grid has two codes for zero. BitMoD spends the second one on a special value v,
which each group chooses among four: two that add resolution (ER) and two that add range on one side (EA).

| bits | basic grid                      | ER     | EA     |
| ---- | ------------------------------- | ------ | ------ |
| 3    | 0, 1, 2, 4 and negatives        | 3, -3  | 6, -6  |
| 4    | 0, 1, 2, 3, 4, 6, 8, 12 and negatives | 10, -10 | 16, -16 |

Shapes: O output rows, I input columns, N groups of a row, W columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.weights.coded import GRIDS, Coded, Grid, from_groups, grouped, stepped
from plait.weights.format import WeightFormat, check_matrix
from plait.weights.stats import Stats
from plait.weights.uniform import Group, coded_bits

__all__ = ["BitMoD"]

# Groups that are searched at once: temporaries of 2^20 weights stay in a few megabytes.
_WEIGHTS_AT_ONCE = 1 << 20
# Half steps on either side of 0 that are told apart; all beyond round to the end of the grid.
_MOST_HALVES = 32
_TYPES = {"all": (0, 1, 2, 3), "er": (0, 1), "ea": (2, 3), "none": ()}


@dataclass(frozen=True, kw_only=True)
class BitMoD(WeightFormat, name="bitmod"):
    """3- or 4-bit codes into a grid that each group of columns chooses for itself; needs no data.

    For each of four grids the scale is the largest magnitude of the group over that of the grid; the first
    grid with the least squared error is kept. Scales are then rounded to 8-bit steps of one fp32 number
    for each row, and the weights rounded again with them. Kept for each group: 8 bits of scale and 2 of
    grid; for each row: 32 bits. Packing a model takes seconds.

    Args:
        bits: of a code, 3 or 4.
        group: columns that share a scale; 0 for the whole row. The last group of a row may be shorter.
        types: which special values a group may choose: `all`, `er` (resolution), `ea` (range), or `none`,
            which is the plain grid.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix, or not finite.
    """

    bits: Literal[3, 4] = 4
    group: Group = 64
    types: Literal["all", "er", "ea", "none"] = "all"

    packs_embeddings = False

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return coded_bits(
            shape, self.bits, self.group, per_group=8 if self.types == "none" else 10, per_row=32
        )

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Coded:
        check_matrix(self.name, weight)
        weight = weight.detach().float()
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{self.name} packs finite weights. The weight has NaN or infinite values.")
        grids = _grids(self.bits, self.types)
        rows = max(1, _WEIGHTS_AT_ONCE // max(1, weight.shape[1]))
        chunks = [_encode(weight[at : at + rows], self.group, grids) for at in range(0, len(weight), rows)]
        if not chunks:
            chunks = [_encode(weight, self.group, grids)]
        codes, scales, types, steps = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        is_plain = self.types == "none"
        grid = GRIDS[f"fp{self.bits}" if is_plain else f"bitmod{self.bits}"]
        return from_groups(
            grid, self.group, codes, scales, types=None if is_plain else types, row_scales=steps
        )


class _Choice(NamedTuple):
    """A grid that may be chosen.

    A weight over its scale is looked up by the half step that it lies in: values lie on whole numbers, so the border
    between two of them is a multiple of a half.

    Attributes:
        number: as types have it.
        largest: magnitude of its values.
        values: the nearest value for each half step, fp32 (H,).
        codes: the code of that value, uint8 (H,).
    """

    number: int
    largest: float
    values: Tensor
    codes: Tensor


def _grids(bits: int, types: str) -> list[_Choice]:
    grid: Grid = GRIDS[f"bitmod{bits}"]
    basic = list(grid.values[:-1])
    special = len(basic)
    choices: list[tuple[int, int | None]] = [(number, grid.specials[number]) for number in _TYPES[types]]
    choices = choices or [(0, None)]
    # The upper end of each half step: of two values that are as near, the lower one.
    ends = torch.arange(-_MOST_HALVES, _MOST_HALVES + 1) / 2
    grids = []
    for number, value in choices:
        pairs = [(float(v), code) for code, v in enumerate(basic)]
        if value is not None:
            pairs.append((float(value), special))
        pairs.sort()
        values = torch.tensor([v for v, _ in pairs])
        codes = torch.tensor([code for _, code in pairs], dtype=torch.uint8)
        nearest = torch.bucketize(ends, (values[1:] + values[:-1]) / 2)
        grids.append(_Choice(number, float(values.abs().max()), values[nearest], codes[nearest]))
    return grids


def _encode(weight: Tensor, group: int, grids: list[_Choice]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 (O, I), 8-bit scales (O, N), grids uint8 (O, N) and steps fp32 (O,) of some rows."""
    parts = grouped(weight, group)
    choices = [_best_grid(part, grids) for part in parts]
    scales = torch.cat([scale for scale, _ in choices], dim=1)
    rounded, steps = stepped(scales)
    codes, start = [], 0
    for part, (_, types) in zip(parts, choices, strict=True):
        real = (rounded[:, start : start + part.shape[1]] * steps[:, None])[..., None]
        codes.append(_codes(part, real, types, grids).flatten(1))
        start += part.shape[1]
    types = torch.cat([types for _, types in choices], dim=1)
    return torch.cat(codes, dim=1), rounded.to(torch.uint8), types, steps


def _best_grid(part: Tensor, grids: list[_Choice]) -> tuple[Tensor, Tensor]:
    """The scale (O, N) and the number uint8 (O, N) of the grid with the least squared error."""
    largest = part.abs().amax(dim=2)
    best = torch.full_like(largest, torch.inf)
    # Where squares are above what fp32 holds, the first grid.
    best_scale = largest / grids[0].largest
    best_type = torch.full_like(largest, grids[0].number, dtype=torch.uint8)
    halves: dict[float, Tensor] = {}
    for grid in grids:
        scale = largest / grid.largest
        if grid.largest not in halves:
            halves[grid.largest] = _halves(part, scale[..., None])
        nearest = grid.values.index_select(0, halves[grid.largest]).view(part.shape)
        error = nearest.mul_(scale[..., None]).sub_(part).square_().mean(dim=2)
        is_better = error < best
        best = torch.where(is_better, error, best)
        best_scale = torch.where(is_better, scale, best_scale)
        best_type = torch.where(is_better, grid.number, best_type)
    return best_scale, best_type


def _halves(part: Tensor, scale: Tensor) -> Tensor:
    """The number of the half step that each weight over its scale lies in, int32 (O * N * W,); that of 0 where the scale is 0."""
    ratio = part / torch.where(scale > 0, scale, torch.inf)
    halves = ratio.mul_(2).ceil_().clamp_(-_MOST_HALVES, _MOST_HALVES)
    return halves.add_(_MOST_HALVES).to(torch.int32).flatten()


def _codes(part: Tensor, scale: Tensor, types: Tensor, grids: list[_Choice]) -> Tensor:
    """Codes uint8 (O, N, W) in the grid that each group has; where the scale is 0, the code of 0."""
    count = 2 * _MOST_HALVES + 1
    starts = torch.zeros(4, dtype=torch.int32)
    for index, grid in enumerate(grids):
        starts[grid.number] = index * count
    halves = _halves(part, scale).view(part.shape) + starts[types.long()][..., None]
    return torch.cat([grid.codes for grid in grids]).index_select(0, halves.flatten()).view(part.shape)
