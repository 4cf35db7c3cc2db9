"""Rotary positions: each pair of channels (c, c + R/2) turns by an angle proportional to the position.

Source: Su et al. 2021, arXiv:2104.09864; the channel pairing is that of GPT-NeoX and Hugging Face.
Shapes: N rows, H heads, D head size, R <= D rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Angles", "Rope", "rotate"]


class Angles(NamedTuple):
    """Cosine and sine of every row's angles, each (N, R/2), fp32."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """The turning speeds of one kind of layer.

    Args:
        frequencies: (R/2,) radians per position.
        amplitude: factor on cosine and sine (YaRN's attention factor), 1 for plain rotary positions.
        rule: for scalings whose speeds depend on the length of the sequence, the function from that
            length to `(frequencies, amplitude)`; None when they do not.
        dtype: in which position times frequency is rounded. In fp32 the angle is off by up to 5e-4 at
            position 8,000, so that moving a strand by rotating its queries would no longer equal
            writing it elsewhere; fp64 is exact for this purpose.
    """

    frequencies: Tensor
    amplitude: float = 1.0
    rule: Callable[[int], tuple[Tensor, float]] | None = None
    dtype: torch.dtype = torch.float64

    def for_length(self, length: int) -> Rope:
        """The speeds to use for a sequence of this many positions; `self` unless they depend on it."""
        return self if self.rule is None else Rope(*self.rule(length), dtype=self.dtype)

    def angles(self, positions: Tensor) -> Angles:
        """Cosine and sine at integer positions (N,)."""
        turn = positions.to(self.dtype)[:, None] * self.frequencies.to(positions.device, self.dtype)
        return Angles((turn.cos() * self.amplitude).float(), (turn.sin() * self.amplitude).float())


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn the first R channels of x (N, H, D) by each row's angles; the others pass unchanged."""
    half = angles.cos.shape[-1]
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)
