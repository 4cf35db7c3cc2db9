"""Rotary positions: each pair of channels (c, c + R/2) turns by an angle proportional to the position.

Source: Su et al. 2021, arXiv:2104.09864; the channel pairing is that of GPT-NeoX and Hugging Face.
Shapes: N rows, H heads, D head size, R <= D rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Angles", "Rope", "rotate"]

_TABLE_CHUNK = 256
_LONGEST_TABLE = 1 << 16


@dataclass(frozen=True, eq=False)
class Angles:
    """Cosine and sine of every row's angles, each (N, R/2), fp32."""

    cos: Tensor
    sin: Tensor

    @cached_property
    def over_channels(self) -> tuple[Tensor, Tensor]:
        """Both spread over the R channels, (N, 1, R), the sine negative in the first half.

        With these a turn is `x * cos + roll(x, R / 2) * sin`.
        """
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


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

    def looked_up(self, positions: Tensor) -> Angles:
        """As `angles`, from a table that is made once and grows by whole chunks of positions.

        A position has the same bits whatever positions it is asked with, which a cosine of many numbers at once
        does not promise. Positions below 0 or from 65,536 on are computed.
        """
        if positions.device.type != "cpu" or not positions.numel():
            return self.angles(positions)
        low, high = (int(end) for end in positions.aminmax())
        if low < 0 or high >= _LONGEST_TABLE:
            inside = (positions >= 0) & (positions < _LONGEST_TABLE)
            near = self.looked_up(positions.where(inside, 0))
            far = self.angles(positions)
            return Angles(*(near_of.where(inside[:, None], of) for near_of, of in
                            ((near.cos, far.cos), (near.sin, far.sin))))  # fmt: skip
        table = self._table.get("angles")
        if table is None or len(table.cos) <= high:
            # Replaced as a whole: several threads may look up at once.
            table = self._table["angles"] = self._longer(table, high // _TABLE_CHUNK + 1)
        return Angles(table.cos.index_select(0, positions), table.sin.index_select(0, positions))

    @cached_property
    def _table(self) -> dict[str, Angles]:
        return {}

    def _longer(self, table: Angles | None, chunks: int) -> Angles:
        """A table of so many chunks, each computed by itself; those that there are stay."""
        parts = [] if table is None else [table]
        held = 0 if table is None else len(table.cos) // _TABLE_CHUNK
        with torch.inference_mode(False), torch.no_grad():
            parts += [
                self.angles(torch.arange(start, start + _TABLE_CHUNK))
                for start in range(held * _TABLE_CHUNK, chunks * _TABLE_CHUNK, _TABLE_CHUNK)
            ]
            return Angles(torch.cat([part.cos for part in parts]), torch.cat([part.sin for part in parts]))


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn the first R channels of x (N, H, D) by each row's angles, or one for all; the others pass unchanged."""
    cos, sin = angles.over_channels
    channels = cos.shape[-1]
    turning = x if channels == x.shape[-1] else x[..., :channels]
    turned = torch.addcmul(turning * cos, turning.roll(channels // 2, -1), sin)
    return turned if turning is x else torch.cat([turned, x[..., channels:]], dim=-1)
