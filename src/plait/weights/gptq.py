"""GPTQ: codes are chosen column by column, and each column's error is made up for by the later ones.

Paper: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323, Algorithm 1. Groups are static: their levels are those of
rounding to nearest, fixed before the first column, so columns may be taken in any order.

Shapes: O output rows, I input columns, N groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.weights.coded import Coded
from plait.weights.format import check_matrix
from plait.weights.stats import Stats
from plait.weights.uniform import Group, Levels, UniformFormat

__all__ = [
    "GPTQ",
    "Feedback",
    "Moments",
    "codes_with_feedback",
    "damped",
    "moments",
    "needed",
    "with_feedback",
]

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
        feedback = moments(self.name, stats, self.damping).feedback(self.order)
        codes = codes_with_feedback(
            weight, levels, feedback, self.bits, self.group, lowest=int(self.symmetric)
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


class Feedback(NamedTuple):
    """How the error of a column is made up for.

    Attributes:
        order: in which columns are taken, int64 (I,).
        upper: the upper Cholesky factor of the inverse second moments in that order, fp32 (I, I).
    """

    order: Tensor
    upper: Tensor


class Moments:
    """Damped second moments of inputs, and what is made of them for every matrix that reads these inputs.

    Args:
        hessian: (I, I) fp64.
    """

    def __init__(self, hessian: Tensor) -> None:
        self.hessian = hessian
        self._feedbacks: dict[str, Feedback] = {}

    def feedback(self, order: str = "activation") -> Feedback:
        """For columns with large inputs first, or in `natural` order.

        Raises:
            ConfigError: the moments have no Cholesky factor.
        """
        if order not in self._feedbacks:
            taken = (
                torch.argsort(self.hessian.diagonal(), descending=True, stable=True)
                if order == "activation"
                else torch.arange(len(self.hessian))
            )
            inverse = _factored(self.hessian[taken][:, taken], _inverse_factor).float()
            self._feedbacks[order] = Feedback(taken, inverse)
        return self._feedbacks[order]

    @cached_property
    def lower(self) -> Tensor:
        """The lower Cholesky factor, fp32 (I, I): D^T H D is the square of D^T times it."""
        return _factored(self.hessian, torch.linalg.cholesky_ex).float()


def moments(name: str, stats: Stats | None, damping: float) -> Moments:
    """The damped moments of the statistics that the format `name` was promised."""
    known = needed(name, stats)
    return known.derived(("moments", damping), lambda: Moments(damped(known.hessian, damping)))


def _inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return lower, failed
    factor: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return factor


def _factored(hessian: Tensor, factor: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """A Cholesky factor, with more damping by tens until there is one; (I, I) fp64."""
    mean = hessian.diagonal().mean()
    for power in range(-2, 3):
        found, failed = factor(hessian)
        if not failed:
            return found
        hessian = hessian.clone()
        hessian.diagonal().add_(10.0**power * mean)
    raise ConfigError("The second moments of the inputs have no Cholesky factor. Give more calibration text.")


def codes_with_feedback(
    weight: Tensor, levels: Levels, feedback: Feedback, bits: int, group: int, *, lowest: int = 0
) -> Tensor:
    """Codes in given evenly spaced levels: Algorithm 1 of the paper, uint8 (O, I).

    Args:
        weight: (O, I) fp32.
        lowest: smallest code.
    """
    size, highest = group or max(1, weight.shape[1]), (1 << bits) - 1
    # A group of columns in one piece.
    scales, zeros = levels.scale.t().contiguous(), levels.zero.t().contiguous()
    safe = torch.where(scales == 0, 1.0, scales).unbind()
    scale_of, zero_of = scales.unbind(), zeros.unbind()

    def nearest(column: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        at = column // size
        # Halves go up, as in `round_half_up`.
        chosen = (rest / safe[at]).add_(zero_of[at]).add_(0.5).floor_().clamp_(lowest, highest)
        return chosen.to(torch.uint8), chosen.sub_(zero_of[at]).mul_(scale_of[at])

    return with_feedback(weight, feedback, nearest)


def with_feedback(
    weight: Tensor, feedback: Feedback, nearest: Callable[[int, Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Codes column by column, the error of each made up for by those that follow; uint8 (O, I).

    Args:
        weight: (O, I) fp32.
        nearest: gives for a column and what is wanted there (O,) the codes, uint8, and the values they stand for.
    """
    columns = weight.shape[1]
    taken, upper = feedback
    rest = weight[:, taken].t().contiguous()  # (I, O): a column of the matrix lies in one piece
    numbers, own = taken.tolist(), upper.diagonal().tolist()
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, columns)
        errors = torch.empty(stop - start, weight.shape[0])
        for index in range(start, stop):
            column, error = rest[index], errors[index - start]
            codes[index], values = nearest(numbers[index], column)
            torch.sub(column, values, out=error).div_(own[index])
            if index + 1 < stop:
                rest[index + 1 : stop].addr_(upper[index, index + 1 : stop], error, alpha=-1)
        if stop < columns:
            rest[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    back = torch.empty_like(codes)
    back[taken] = codes
    return back.t().contiguous()
