"""Round to nearest: evenly spaced levels with one scale for each group of columns, from the weights alone.

Shapes: O output rows, I input columns, N groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from plait.weights.coded import GRIDS, Coded, from_groups, grouped, half, num_groups
from plait.weights.format import WeightFormat, check_matrix
from plait.weights.stats import Stats
from plait.weights.tiles import BLOCK, TILE, num_blocks, num_tiles

__all__ = [
    "Group",
    "Levels",
    "Uniform",
    "UniformFormat",
    "coded_bits",
    "nearest_codes",
    "nearest_levels",
    "pack_codes",
    "round_half_up",
]

Group = Annotated[int, Field(ge=0, le=1 << 16)]


class Levels(NamedTuple):
    """Where the levels of each group lie: `scale * (code - zero)`; fp32 (O, G) of numbers that fp16 holds."""

    scale: Tensor
    zero: Tensor


def round_half_up(x: Tensor) -> Tensor:
    """The nearest whole number; halves go up, so that shifted grids round alike."""
    return (x + 0.5).floor()


def nearest_levels(weight: Tensor, bits: int, group: int, *, symmetric: bool) -> Levels:
    """Levels between the extremes of each group, 0 among them.

    Symmetric levels are `scale * q` for q in [1 - 2^(b-1), 2^(b-1) - 1]; the others have a whole zero in
    [0, 2^b - 1], so that 0 is a level and both extremes are nearly so.
    """
    scales, zeros = [], []
    top = (1 << bits) - 1
    for part in grouped(weight.float(), group):
        if symmetric:
            scale = half(part.abs().amax(dim=2) / ((top - 1) // 2), "Scales").float()
            zero = torch.full_like(scale, (top + 1) // 2)
        else:
            low, high = part.amin(dim=2).clamp(max=0), part.amax(dim=2).clamp(min=0)
            scale = half((high - low) / top, "Scales").float()
            zero = round_half_up(-low / scale.clamp(min=1e-30)).clamp(0, top)
        scales.append(scale)
        zeros.append(zero)
    return Levels(torch.cat(scales, dim=1), torch.cat(zeros, dim=1))


def nearest_codes(weight: Tensor, levels: Levels, bits: int, group: int, *, symmetric: bool) -> Tensor:
    """The nearest code of each weight, uint8 (O, I)."""
    parts, start = [], 0
    for part in grouped(weight.float(), group):
        here = slice(start, start + part.shape[1])
        scale, zero = levels.scale[:, here, None], levels.zero[:, here, None]
        codes = round_half_up(part / torch.where(scale == 0, 1.0, scale)) + zero
        codes = torch.where(scale == 0, zero, codes).clamp(int(symmetric), (1 << bits) - 1)
        parts.append(codes.flatten(1).to(torch.uint8))
        start = here.stop
    return torch.cat(parts, dim=1)


def pack_codes(codes: Tensor, levels: Levels, bits: int, group: int, *, symmetric: bool) -> Coded:
    """Codes and levels as a matrix; scales and zeros are rounded to fp16."""
    zeros = None if symmetric else half(levels.zero, "Zeros")
    return from_groups(GRIDS[f"uniform{bits}"], group, codes, half(levels.scale, "Scales"), zeros=zeros)


def coded_bits(
    shape: tuple[int, int], bits: int, group: int, *, per_group: float, per_row: float = 0.0
) -> float:
    """Bits for each weight of a coded matrix: codes, what groups and rows add, and what fills up tiles."""
    rows, columns = num_tiles(shape[0]) * TILE, num_blocks(shape[1]) * BLOCK
    numbers = num_groups(shape[1], group) * per_group + per_row
    return rows * (columns * bits + numbers) / max(1, shape[0] * shape[1])


class UniformFormat(WeightFormat):
    """What formats of evenly spaced levels share: fields `bits`, `group` and `symmetric`."""

    packs_embeddings = False
    bits: int
    group: int
    symmetric: bool

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return coded_bits(shape, self.bits, self.group, per_group=16 if self.symmetric else 32)

    def levels(self, weight: Tensor) -> Levels:
        """The levels of rounding to nearest."""
        return nearest_levels(weight, self.bits, self.group, symmetric=self.symmetric)

    def nearest(self, weight: Tensor, levels: Levels) -> Tensor:
        """The nearest codes, uint8 (O, I)."""
        return nearest_codes(weight, levels, self.bits, self.group, symmetric=self.symmetric)

    def packed(self, codes: Tensor, levels: Levels) -> Coded:
        """The matrix that has these codes and levels."""
        return pack_codes(codes, levels, self.bits, self.group, symmetric=self.symmetric)


@dataclass(frozen=True, kw_only=True)
class Uniform(UniformFormat, name="uniform"):
    """Evenly spaced levels for each group of columns, every weight rounded to the nearest.

    Looks at the weights only. An asymmetric group has `2^bits` levels from its smallest to its largest
    weight, one of them 0; a symmetric one `2^bits - 1` around 0. A weight moves by at most half a step,
    a whole one at the ends, plus the rounding of the scale to fp16. Kept: codes, and 32 bits for
    each group, 16 where symmetric.

    Args:
        bits: of a code, 2, 3, 4 or 8.
        group: columns that share a scale; 0 for the whole row. The last group of a row may be shorter.
        symmetric: whether levels lie around 0, without a zero to keep.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix, not finite, or above what fp16 scales hold.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group: Group = 64
    symmetric: bool = False

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Coded:
        check_matrix(self.name, weight)
        weight = weight.detach()
        levels = self.levels(weight)
        return self.packed(self.nearest(weight, levels), levels)
