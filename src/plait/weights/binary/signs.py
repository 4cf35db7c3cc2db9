"""Signs with the gradients that stand in for theirs; zero is positive, since a bit holds two values and not three.

Shapes are those of the input throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["approx_sign", "clip_sign", "plain_sign", "signs_of", "sloped_sign"]


def signs_of(x: Tensor) -> Tensor:
    """1 where x is 0 or above, else -1; no gradient."""
    return torch.where(x.detach() >= 0, 1.0, -1.0).to(x.dtype)


def sloped_sign(x: Tensor, slope: Tensor) -> Tensor:
    """The sign, whose gradient is `slope` in place of its own."""
    signs: Tensor = _Sloped.apply(x, slope)  # type: ignore[no-untyped-call]
    return signs


def plain_sign(x: Tensor) -> Tensor:
    """The sign; gradients pass everywhere."""
    return sloped_sign(x, torch.ones_like(x))


def clip_sign(x: Tensor) -> Tensor:
    """The sign; gradients pass where |x| is at most 1 (Hubara et al. 2016, arXiv:1602.02830, equation 4)."""
    return sloped_sign(x, (x.detach().abs() <= 1).to(x.dtype))


def approx_sign(x: Tensor) -> Tensor:
    """The sign; gradients are 2 - 2|x| where that is positive, else 0 (Liu et al. 2018, arXiv:1808.00278, eq. 7).

    The derivative of two parabolas that meet the sign at -1, 0 and 1. ReCU's estimator is the same hat.
    """
    return sloped_sign(x, (2 - 2 * x.detach().abs()).clamp(min=0))


class _Sloped(torch.autograd.Function):
    """The sign of x, and the gradient multiplied by a slope that is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return signs_of(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None
