"""The packed rows of one forward pass: tokens of many sequences side by side, without padding."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import NamedTuple

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.ops import Angles, Causal, Mask, Rope

__all__ = ["Rows", "Segment", "Turn", "check_pasts", "in_order", "turns_of"]


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

    Raises:
        ConfigError: a negative length or position, or a tree with more or fewer nodes than rows.
    """

    def __init__(
        self, segments: Sequence[tuple[int, int] | tuple[int, int, Mask]], device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.segments: list[Segment] = []
        start = 0
        for length, position, *mask in segments:
            if length < 0 or position < 0:
                raise ConfigError(
                    "Rows takes segments of a length and a position from 0 on. "
                    f"Got length {length} at position {position}."
                )
            self.segments.append(Segment(start, length, position, mask[0] if mask else Causal()))
            start += length
        self.count = start
        positions = [segment.position + segment.mask.depths(segment.length) for segment in self.segments]
        self.positions: Tensor = (
            torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64)
        ).to(self.device)
        self._angles: dict[tuple[Rope, tuple[int, ...]], Angles] = {}
        self._pinned: dict[tuple[Rope, int], Angles] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def last(self) -> Tensor:
        """Index of the last row of each segment, (segments,) int64.

        Raises:
            ConfigError: a segment is empty.
        """
        if any(segment.length == 0 for segment in self.segments):
            raise ConfigError("An empty segment has no last row. Leave sequences without new tokens out.")
        last = [segment.start + segment.length - 1 for segment in self.segments]
        return torch.tensor(last, dtype=torch.int64, device=self.device)

    def angles(self, rope: Rope, offsets: Sequence[int]) -> Angles:
        """Rotary angles of every row, each segment in a frame that starts at its offset.

        Computed once for each rope and choice of frames, so that layers share them.
        """
        key = (rope, tuple(offsets))
        if key not in self._angles:
            if rope.rule is None or not self.segments:
                if len(set(key[1])) == 1:
                    self._angles[key] = rope.looked_up(self.positions - offsets[0])
                    return self._angles[key]
                lengths = torch.tensor([segment.length for segment in self.segments], dtype=torch.int64)
                shift = torch.tensor(list(offsets), dtype=torch.int64).repeat_interleave(lengths)
                self._angles[key] = rope.looked_up(self.positions - shift.to(self.device))
            else:
                parts = [
                    self._angles_of(segment, rope, offset)
                    for segment, offset in zip(self.segments, offsets, strict=True)
                ]
                self._angles[key] = Angles(
                    torch.cat([a.cos for a in parts]), torch.cat([a.sin for a in parts])
                )
        return self._angles[key]

    def angles_at(self, rope: Rope, position: int) -> Angles:
        """Rotary angles of every row as if all of them stood at one frame position; shared by layers."""
        key = (rope, position)
        if key not in self._pinned:
            at = rope.looked_up(torch.tensor([position], device=self.device))
            self._pinned[key] = Angles(at.cos.expand(len(self), -1), at.sin.expand(len(self), -1))
        return self._pinned[key]

    def _angles_of(self, segment: Segment, rope: Rope, offset: int) -> Angles:
        positions = self.positions[segment.rows]
        if rope.rule is not None and segment.length:
            # The nodes of a tree share positions, so the sequence is as long as its deepest node says.
            rope = rope.for_length(int(positions.max()) + 1)
        return rope.angles(positions - offset)


class Turn(NamedTuple):
    """Rows that are attended together, where a segment is read in runs, one after the other.

    Attributes:
        segments: numbers of the segments that have a run in this turn.
        chosen: (n,) int64, the packed rows of their runs.
        rows: these as packed rows of their own.
    """

    segments: list[int]
    chosen: Tensor
    rows: Rows


def turns_of(rows: Rows, runs: Sequence[Sequence[range]]) -> list[Turn]:
    """The first run of every segment, then the second one of those that have one, and so on.

    Args:
        runs: of each segment, its rows in runs.
    """
    turns = []
    for number in range(max(map(len, runs), default=0)):
        taking = [index for index, of_segment in enumerate(runs) if number < len(of_segment)]
        pieces: list[tuple[int, int, Mask]] = []
        chosen: list[Tensor] = []
        for index in taking:
            segment, run = rows.segments[index], runs[index][number]
            pieces.append((len(run), segment.position + run.start, segment.mask))
            start = segment.start + run.start
            chosen.append(torch.arange(start, start + len(run), device=rows.device))
        turns.append(Turn(taking, torch.cat(chosen), Rows(pieces, rows.device)))
    return turns


def in_order(turns: Sequence[Turn], parts: Sequence[Tensor]) -> Tensor:
    """What each turn gave for its rows (n, ...), in the order of all packed rows."""
    return torch.cat(list(parts))[torch.cat([turn.chosen for turn in turns]).argsort()]


def check_pasts(rows: Rows, pasts: Sequence[Sized]) -> None:
    """Check that each segment continues the past it is given with, before anything is written.

    Raises:
        ConfigError: not one past for each segment, a past that is given twice, or a segment whose first
            position is not the next one of its past.
    """
    if len(pasts) != len(rows.segments):
        raise ConfigError(f"Each segment needs one past. Got {len(pasts)} for {len(rows.segments)} segments.")
    if len({id(past) for past in pasts}) != len(pasts):
        raise ConfigError("A past is given for two segments. Put the rows of one sequence in one segment.")
    for index, (past, segment) in enumerate(zip(pasts, rows.segments, strict=True)):
        if segment.position != len(past):
            raise ConfigError(
                f"Segment {index} starts at position {segment.position}, but its past holds {len(past)} "
                "tokens. Rows continue where the past ends; truncate it first to write earlier."
            )
