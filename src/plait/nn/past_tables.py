"""What a native program writes and reads of one past, as tables of whole numbers that last while its strands do.

Shapes: L layers, V visits of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from plait.memory import Memory, Past, Segment, Strand
from plait.memory.strand import DenseStrand, Layout
from plait.ops import Rope, Tree

__all__ = ["TARGET_COLUMNS", "VISIT_COLUMNS", "Frame", "PastTables"]

_Numbers = npt.NDArray[np.int64]

TARGET_COLUMNS, VISIT_COLUMNS = 10, 14
# Columns that change from one forward pass to the next.
_AT, _TARGET_TABLE = 7, 9
_SEGMENT, _LENGTH, _VISIT_TABLE = 1, 8, 12


class Frame(NamedTuple):
    """Which angles turn a row: those of its position from `offset` on, or those of one position for all rows."""

    rope: Rope
    offset: int
    is_pinned: bool


class _Layer(NamedTuple):
    """What a layer's memory held when its tables were made."""

    memory: Memory
    tail: DenseStrand
    layout: Layout
    strands: list[Strand]


class PastTables:
    """Where the new rows of one past go, and which strands they visit, layer by layer.

    Attributes:
        targets: (L, 10), the strand of each layer that new rows are written to.
        visits: (V, 14), the strands that they visit, by layer and oldest first.
        frames: whose tables of angles both ask for; see `number`.
        is_lasting: whether they can serve the next forward pass too, if strands stay the same.
    """

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.targets: _Numbers = np.zeros((0, TARGET_COLUMNS), np.int64)
        self.visits: _Numbers = np.zeros((0, VISIT_COLUMNS), np.int64)
        self.is_lasting = True
        self._layers: list[_Layer] = []
        self._capacity = 0
        # Of every target and visit, its frame; and the visits to tails.
        self._target_frames: _Numbers = np.zeros(0, np.int64)
        self._visit_frames: _Numbers = np.zeros(0, np.int64)
        self._tails: _Numbers = np.zeros(0, np.int64)

    @classmethod
    def made(cls, past: Past, segment: Segment, ropes: Sequence[Rope | None]) -> Self | None:
        """Make room for a segment's rows in every layer, and note what they visit.

        Returns:
            None for a strand or a visit of a kind that the program does not have; rows are pending in some
            layers then.
        """
        self = cls()
        draft = segment.mask if isinstance(segment.mask, Tree) else None
        targets: list[int] = []
        visits: list[int] = []
        target_frames: list[int] = []
        visit_frames: list[int] = []
        tails: list[int] = []
        for layer, (memory, rope) in enumerate(zip(past.layers, ropes, strict=True)):
            assert isinstance(memory, Memory)
            first = memory.extend(segment.length, draft)
            at = memory.tail.layout
            if at is None:
                return None
            targets += (*at[:7], first, at.number, -1)
            target_frames.append(self._frame(rope, memory.tail.offset, False))
            self._layers.append(_Layer(memory, memory.tail, at, list(memory.strands)))
            for strand, window, mask, turned_at, queries, log_weight in memory.plan.policy.visits(
                memory, segment
            ):
                at = strand.layout
                if at is None or mask is not None or queries is not None or log_weight:
                    return None
                if strand is memory.tail:
                    tails.append(len(visit_frames))
                offset = strand.offset if turned_at is None else turned_at
                visit_frames.append(self._frame(rope, offset, turned_at is not None))
                visits += (layer, 0, *at[:6], at.first + len(strand), at.number)
                visits += (strand.offset + strand.start - at.first, window or 0, -1, at.first)
            self.is_lasting &= memory.plan.is_steady
        self.is_lasting &= 0 < len(tails) == len(self._layers)
        self._capacity = min((layer.layout.capacity for layer in self._layers), default=0)
        self.targets = np.array(targets, dtype=np.int64).reshape(-1, TARGET_COLUMNS)
        self.visits = np.array(visits, dtype=np.int64).reshape(-1, VISIT_COLUMNS)
        self._target_frames = np.array(target_frames, dtype=np.int64)
        self._visit_frames = np.array(visit_frames, dtype=np.int64)
        self._tails = np.array(tails, dtype=np.int64)
        return self

    def extended(self, segment: Segment) -> bool:
        """Make room for the next rows, if every strand is where it was; else nothing is changed."""
        first = self._layers[0].tail.length
        if first + segment.length > self._capacity:
            return False
        for memory, tail, layout, strands in self._layers:
            if memory.tail is not tail or tail.layout is not layout or tail.length != first:
                return False
            if memory.pending or memory.strands != strands:
                return False
        draft = segment.mask if isinstance(segment.mask, Tree) else None
        for memory, *_ in self._layers:
            memory.extend(segment.length, draft)
        self.targets[:, _AT] = first
        self.visits[self._tails, _LENGTH] = first + segment.length
        return True

    def number(self, segment: int, tables: Sequence[int]) -> None:
        """Say which segment this is, and which table of angles each of its frames has."""
        # The last stands for rows that are not turned.
        numbers = np.array([*tables, -1])
        self.targets[:, _TARGET_TABLE] = numbers[self._target_frames]
        self.visits[:, _VISIT_TABLE] = numbers[self._visit_frames]
        self.visits[:, _SEGMENT] = segment

    @staticmethod
    def joined(parts: Sequence[PastTables]) -> tuple[_Numbers, _Numbers]:
        """The targets of all segments, by layer, and their visits, by layer and segment."""
        if len(parts) == 1:
            return parts[0].targets, parts[0].visits
        if not parts:
            return np.zeros((0, TARGET_COLUMNS), np.int64), np.zeros((0, VISIT_COLUMNS), np.int64)
        targets = np.stack([part.targets for part in parts], axis=1).reshape(-1, TARGET_COLUMNS)
        visits = np.concatenate([part.visits for part in parts])
        order: npt.NDArray[Any] = np.argsort(visits[:, 0], kind="stable")
        return targets, visits[order]

    def _frame(self, rope: Rope | None, offset: int, is_pinned: bool) -> int:
        if rope is None:
            return -1
        frame = Frame(rope, offset, is_pinned)
        if frame not in self.frames:
            self.frames.append(frame)
        return self.frames.index(frame)
