"""The packed rows of one forward pass: tokens of many sequences side by side, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plait.ops import Angles, Causal, Mask, Rope

__all__ = ["Rows", "Segment"]


class Segment(NamedTuple):
    """A run of rows that belongs to one sequence.

    Attributes:
        start: index of its first row.
        length: number of rows.
        position: position, in the sequence, of its first row.
        mask: which of the sequence's keys each row sees.
    """

    start: int
    length: int
    position: int
    mask: Mask

    @property
    def rows(self) -> slice:
        """The segment's rows as an index."""
        return slice(self.start, self.start + self.length)


class Rows:
    """Which sequence and position each packed row belongs to. Token-wise work ignores it.

    Args:
        segments: runs of rows in order, each `(length, first position, mask)`; the mask is causal
            when left out.
        device: where the rows' tensors live.
    """

    def __init__(
        self, segments: Sequence[tuple[int, int] | tuple[int, int, Mask]], device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.segments: list[Segment] = []
        start = 0
        for length, position, *mask in segments:
            self.segments.append(Segment(start, length, position, mask[0] if mask else Causal()))
            start += length
        self.count = start
        positions = [segment.position + segment.mask.depths(segment.length) for segment in self.segments]
        self.positions: Tensor = (
            torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64)
        ).to(self.device)
        self._angles: dict[tuple[Rope, tuple[int, ...]], Angles] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def last(self) -> Tensor:
        """Index of the last row of each segment, (segments,) int64."""
        return torch.tensor(
            [segment.start + segment.length - 1 for segment in self.segments], device=self.device
        )

    def angles(self, rope: Rope, offsets: Sequence[int]) -> Angles:
        """Rotary angles of every row, each segment in a frame that starts at its offset.

        Computed once for each rope and choice of frames, so that layers share them.
        """
        key = (rope, tuple(offsets))
        if key not in self._angles:
            parts = [
                rope.for_length(segment.position + segment.length).angles(
                    self.positions[segment.rows] - offset
                )
                for segment, offset in zip(self.segments, offsets, strict=True)
            ]
            self._angles[key] = Angles(torch.cat([a.cos for a in parts]), torch.cat([a.sin for a in parts]))
        return self._angles[key]
