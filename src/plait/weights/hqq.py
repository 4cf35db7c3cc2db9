"""HQQ: zeros that make a sparse error, from the weights alone.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
mobiusml.github.io/hqq_blog: minimise sum |w - s (q - z)|^p, p < 1, over z by half-quadratic splitting,
    e <- shrink(w - s (q - z), beta),  shrink(x, beta) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    z <- mean over the group of q - (w - e) / s,  beta <- kappa beta.

Shapes: O output rows, I input columns, N groups of a row, W columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from plait.weights.coded import Coded, grouped
from plait.weights.format import check_matrix
from plait.weights.stats import Stats
from plait.weights.uniform import Group, Levels, UniformFormat, round_half_up

__all__ = ["HQQ"]


@dataclass(frozen=True, kw_only=True)
class HQQ(UniformFormat, name="hqq"):
    """Evenly spaced levels whose zeros are fitted so that few weights have large errors; needs no data.

    Scales are those of the group's extremes; zeros need not be whole. Kept as `uniform` is. Packing takes
    `rounds` times as long as rounding.

    Args:
        bits: of a code, 2, 3, 4 or 8.
        group: columns that share a scale; 0 for the whole row. The last group of a row may be shorter.
        power: p of the norm of the error, in (0, 1).
        rounds: steps at most; each group keeps the zero of the step with its least mean error.

    Raises:
        ConfigError: from `pack`, as `uniform` says.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group: Group = 64
    power: Annotated[float, Field(gt=0, lt=1)] = 0.7
    rounds: Annotated[int, Field(ge=1, le=1000)] = 20

    symmetric = False

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Coded:
        check_matrix(self.name, weight)
        weight = weight.detach().float()
        parts = grouped(weight, self.group)
        first = [_extremes(part, self.bits) for part in parts]
        zeros = torch.cat(
            [self._fit(part, *levels) for part, levels in zip(parts, first, strict=True)], dim=1
        )
        levels = Levels(torch.cat([scale for scale, _ in first], dim=1), zeros.half().float())
        codes, start = [], 0
        for part in parts:
            here = slice(start, start + part.shape[1])
            codes.append(
                _codes(part, levels.scale[:, here, None], levels.zero[:, here, None], self.bits).flatten(1)
            )
            start = here.stop
        return self.packed(torch.cat(codes, dim=1).to(torch.uint8), levels)

    def _fit(self, part: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Zeros (O, N) for weights (O, N, W)."""
        scale, zero = scale[..., None], zero[..., None]
        safe = torch.where(scale == 0, 1.0, scale)
        beta, best = 10.0, zero
        least = torch.full_like(zero, torch.inf)
        for _ in range(self.rounds):
            codes = _codes(part, scale, zero, self.bits)
            error = part - scale * (codes - zero)
            mean = error.abs().mean(dim=2, keepdim=True)
            is_better = mean < least
            if not is_better.any():
                break
            least, best = torch.where(is_better, mean, least), torch.where(is_better, zero, best)
            sparse = error.sign() * (
                error.abs() - error.abs().clamp(min=1e-12) ** (self.power - 1) / beta
            ).clamp(min=0)
            zero = (codes - (part - sparse) / safe).mean(dim=2, keepdim=True)
            beta *= 1.01
        return best[..., 0]


def _extremes(part: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (rounded to fp16) and real zero between the extremes of each group."""
    low, high = part.amin(dim=2), part.amax(dim=2)
    scale = ((high - low) / ((1 << bits) - 1)).half().float()
    # A group of one value is `scale * (1 - 0)`: its code is 1.
    flat = scale == 0
    return torch.where(flat, low.half().float(), scale), torch.where(
        flat, 0.0, -low / torch.where(flat, 1.0, scale)
    )


def _codes(part: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    safe = torch.where(scale == 0, 1.0, scale)
    return round_half_up(part / safe + zero).clamp(0, (1 << bits) - 1)
