"""Biases of attention scores by how far a key stands from its query.

    score(i, j) = scale q_i . k_j - m_h f(|i - j|)     f(n) = n, or H(n) = 1 + 1/2 + ... + 1/n, H(0) = 0

With f(n) = n this is ALiBi, whose weights fall exponentially: Press et al. 2021, arXiv:2108.12409. With the harmonic
numbers exp(-m H(n)) is about a constant times n^-m, so that the softmax weight is that of q . k times a power of
the distance: after Li 2024, arXiv:2410.18441, of which only the abstract was at hand.

Shapes: Q queries, T keys, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

__all__ = ["DistanceBias", "Schedule", "alibi_slopes", "harmonic_numbers", "harmonic_slopes"]

Schedule = Literal["harmonic", "linear"]

_EULER = 0.5772156649015329
# Harmonic numbers that are summed up; from here on the series is exact to fp64.
_TABLE = 1 << 14


def harmonic_numbers(n: Tensor) -> Tensor:
    """H(n) of whole numbers from 0 on, fp64; off by less than 1e-12."""
    last = _TABLE - 1
    near = _harmonic_table().to(n.device)[n.clamp(max=last)]
    return near if not n.numel() or int(n.max()) <= last else near.where(n <= last, _harmonic_series(n))


def _harmonic_series(n: Tensor) -> Tensor:
    """ln n + gamma + 1 / (2n) - 1 / (12 n^2), which is off by less than 1 / (120 n^4)."""
    x = n.clamp(min=1).double()
    return x.log() + _EULER + 1 / (2 * x) - 1 / (12 * x * x)


@cache
def _harmonic_table() -> Tensor:
    # A tensor made in inference mode could not be used where gradients are asked for.
    with torch.inference_mode(False):
        terms = torch.arange(_TABLE, dtype=torch.float64)
        terms[1:].reciprocal_()
        return terms.cumsum(0)


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes: 2^(-8h / heads) for h from 1 on.

    Where the number of heads is not a power of two: those of the power of two below it, then every other one
    of the next power of two.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    return slopes + [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (num_heads - power), 2)]


def harmonic_slopes(num_heads: int) -> list[float]:
    """1 / h for h from 1 on."""
    return [1.0 / h for h in range(1, num_heads + 1)]


@dataclass(frozen=True, eq=False)
class DistanceBias:
    """What is taken off the scores of each head.

    Args:
        slopes: (H,) fp32, m_h.
        schedule: `harmonic` numbers of the distance, or the distance itself (`linear`).
        limit: larger distances count as this one; None for no limit.
    """

    slopes: Tensor
    schedule: Schedule
    limit: int | None = None

    def growth(self, distances: Tensor) -> Tensor:
        """f of distances in either direction, int64 of any shape -> fp32."""
        n = distances.abs()
        if self.limit is not None:
            n = n.clamp(max=self.limit)
        return n.float() if self.schedule == "linear" else harmonic_numbers(n).float()

    def applied(self, scores: Tensor, distances: Tensor) -> Tensor:
        """Scores (H, Q, T) fp32, less their bias; distances (Q, T) int64, from each key up to each query."""
        slopes, growth = (x.to(scores.device) for x in (self.slopes[:, None, None], self.growth(distances)))
        return torch.addcmul(scores, slopes, growth, value=-1)

    def at(self, distance: int) -> Tensor:
        """The bias of each head at one distance, (H,) fp32; 0 or below where slopes are not negative."""
        return -self.slopes * self.growth(torch.tensor(distance))

    def divided_by(self, temperature: float) -> DistanceBias:
        """The bias of scores that are divided by a temperature."""
        return replace(self, slopes=self.slopes / temperature)
