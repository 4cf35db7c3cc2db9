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
    """

    frequencies: Tensor
    amplitude: float = 1.0
    rule: Callable[[int], tuple[Tensor, float]] | None = None

    def for_length(self, length: int) -> Rope:
        """The speeds to use for a sequence of this many positions; `self` unless they depend on it."""
        return self if self.rule is None else Rope(*self.rule(length))

    def angles(self, positions: Tensor) -> Angles:
        """Cosine and sine at integer positions (N,).

        The angle is formed in fp64: in fp32 it would be wrong by 5e-4 at position 8,000, and moving
        a strand by rotating its queries would no longer equal writing it elsewhere.
        """
        turn = positions.to(torch.float64)[:, None] * self.frequencies.to(torch.float64)
        return Angles(
            (turn.cos() * self.amplitude).to(torch.float32), (turn.sin() * self.amplitude).to(torch.float32)
        )


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn the first R channels of x (N, H, D) by each row's angles; the others pass unchanged."""
    half = angles.cos.shape[-1]
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)
