"""GPTQ: codes are chosen column by column, and each column's error is made up for by the later ones.

Paper: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323, Algorithm 1. Groups are static: their levels are those of
rounding to nearest, fixed before the first column, so columns may be taken in any order.

Shapes: O output rows, I input columns, N groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.weights.coded import Coded
from plait.weights.format import check_matrix
from plait.weights.stats import Stats
from plait.weights.uniform import Group, Levels, UniformFormat, round_half_up

__all__ = ["GPTQ", "codes_with_feedback", "damped", "inverse_factor", "needed"]

# Columns whose errors reach the rest of the row together.
_COLUMNS_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class GPTQ(UniformFormat, name="gptq"):
    """Evenly spaced levels, with codes that keep the outputs on a calibration text.

    The levels are those of `uniform`; the codes are not the nearest ones, but those that GPTQ's
    error feedback finds with the second moments of the inputs. Kept as `uniform` is. Costs about I^2 O
    operations and 8 I^2 bytes for a matrix.

    Args:
        bits: of a code, 2, 3, 4 or 8.
        group: columns that share a scale; 0 for the whole row. The last group of a row may be shorter.
        symmetric: whether levels lie around 0, without a zero to keep.
        damping: share of the mean of the second moments that is added to each, in (0, 1].
        order: `activation` takes columns with large inputs first, `natural` from left to right.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix of finite numbers, or no `hessian`.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group: Group = 64
    symmetric: bool = False
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    order: Literal["activation", "natural"] = "activation"

    needs = frozenset({"hessian"})

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Coded:
        check_matrix(self.name, weight)
        weight = weight.detach().float()
        levels = self.levels(weight)
        hessian = damped(needed(self.name, stats).hessian, self.damping)
        codes = codes_with_feedback(
            weight, levels, hessian, self.bits, self.group, lowest=int(self.symmetric), order=self.order
        )
        return self.packed(codes, levels)


def needed(name: str, stats: Stats | None) -> Stats:
    """The statistics that a format was promised.

    Raises:
        ConfigError: there are none.
    """
    if stats is None:
        raise ConfigError(
            f"{name} needs calibration text. Use plait quantize --calibration FILE, or pack(weight, stats)."
        )
    return stats


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Second moments with a share of their mean added to each diagonal entry, (I, I) fp64."""
    hessian = hessian.double().clone()
    mean = hessian.diagonal().mean().clamp(min=1e-30)
    hessian.diagonal().add_(damping * mean)
    return hessian


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, with more damping by tens until there is one; (I, I) fp64."""
    mean = hessian.diagonal().mean()
    for power in range(-2, 3):
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        hessian = hessian.clone()
        hessian.diagonal().add_(10.0**power * mean)
    raise ConfigError("The second moments of the inputs have no Cholesky factor. Give more calibration text.")


def codes_with_feedback(
    weight: Tensor,
    levels: Levels,
    hessian: Tensor,
    bits: int,
    group: int,
    *,
    lowest: int = 0,
    order: str = "activation",
) -> Tensor:
    """Codes in given evenly spaced levels: Algorithm 1 of the paper, uint8 (O, I).

    Args:
        weight: (O, I) fp32.
        hessian: damped second moments, (I, I) fp64.
        lowest: smallest code.
        order: `activation` or `natural`.
    """
    size, highest = group or max(1, weight.shape[1]), (1 << bits) - 1
    # A group of columns in one piece.
    scales, zeros = levels.scale.t().contiguous(), levels.zero.t().contiguous()
    safe = torch.where(scales == 0, 1.0, scales)

    def nearest(column: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        at = column // size
        chosen = round_half_up(rest / safe[at] + zeros[at]).clamp_(lowest, highest)
        return chosen.to(torch.uint8), scales[at] * (chosen - zeros[at])

    return with_feedback(weight, hessian, nearest, order)


def with_feedback(
    weight: Tensor,
    hessian: Tensor,
    nearest: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    order: str = "activation",
) -> Tensor:
    """Codes column by column, the error of each made up for by those that follow; uint8 (O, I).

    Args:
        weight: (O, I) fp32.
        hessian: damped second moments, (I, I) fp64.
        nearest: gives for a column and what is wanted there (O,) the codes, uint8, and the values they stand for.
        order: `activation` or `natural`.
    """
    columns = weight.shape[1]
    taken = (
        torch.argsort(hessian.diagonal(), descending=True, stable=True)
        if order == "activation"
        else torch.arange(columns)
    )
    upper = inverse_factor(hessian[taken][:, taken]).float()
    rest = weight[:, taken].t().contiguous()  # (I, O): a column of the matrix lies in one piece
    numbers = taken.tolist()
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, columns)
        errors = torch.zeros(stop - start, weight.shape[0])
        for index in range(start, stop):
            codes[index], values = nearest(numbers[index], rest[index])
            error = (rest[index] - values) / upper[index, index]
            errors[index - start] = error
            if index + 1 < stop:
                rest[index + 1 : stop].addr_(upper[index, index + 1 : stop], error, alpha=-1)
        if stop < columns:
            rest[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    back = torch.empty_like(codes)
    back[taken] = codes
    return back.t().contiguous()
