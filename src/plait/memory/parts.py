"""The parts that visits gave, and their merge for each sequence: one merge for all sequences that visited as often.

Shapes: n queries of a segment, H query heads, V value size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from plait.memory.plan import Visit
from plait.memory.rows import Segment
from plait.ops import Partial, merge

__all__ = ["Parts", "Run", "Visitor", "part_of", "rows_of"]

Stack = TypeVar("Stack", Tensor, Partial)


class Run(NamedTuple, Generic[Stack]):
    """Rows [start, stop) of something that was computed for several sequences together."""

    stack: Stack
    start: int
    stop: int


class Visitor(NamedTuple):
    """Visit `place` of segment `number`."""

    number: int
    place: int
    segment: Segment
    visit: Visit

    @property
    def queries(self) -> range:
        """The visiting queries, as indices within the segment."""
        return range(self.segment.length) if self.visit.queries is None else self.visit.queries


def rows_of(runs: Sequence[Run[Tensor]]) -> Tensor:
    """The rows of one or more runs, one behind the other; a view where they lie so already."""
    return _behind([_cut(*run) for run in _joined(runs)])


def part_of(runs: Sequence[Run[Partial]]) -> Partial:
    """The same of parts."""
    joined = _joined(runs)
    outs = [_cut(part.out, start, stop) for part, start, stop in joined]
    return Partial(_behind(outs), _behind([_cut(part.lse, start, stop) for part, start, stop in joined]))


def _joined(runs: Sequence[Run[Stack]]) -> list[Run[Stack]]:
    """Runs that continue each other as one, so that few are copied, or none."""
    found: list[Run[Stack]] = []
    for run in runs:
        last = found[-1] if found else None
        if last is not None and last.stack is run.stack and last.stop == run.start:
            found[-1] = Run(run.stack, last.start, run.stop)
        else:
            found.append(run)
    return found


def _cut(rows: Tensor, start: int, stop: int) -> Tensor:
    return rows if stop - start == rows.shape[0] else rows[start:stop]


def _behind(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Parts:
    """What every visit of every segment gave.

    Args:
        segments: of the packed rows.
        visits: of each segment, in the order in which their parts are merged.
        new_empty: the part of some queries that saw nothing.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        visits: Sequence[Sequence[Visit]],
        new_empty: Callable[[int], Partial],
    ) -> None:
        self.segments, self.visits, self.new_empty = segments, visits, new_empty
        self._found: list[list[Run[Partial] | None]] = [[None] * len(own) for own in visits]

    def put(self, visitors: Iterable[Visitor], part: Partial) -> None:
        """Take the part of some visitors' queries, stacked in their order."""
        start = 0
        for visitor in visitors:
            stop = start + len(visitor.queries)
            self._found[visitor.number][visitor.place] = Run(part, start, stop)
            start = stop

    def has(self, visitor: Visitor) -> bool:
        """Whether the part of a visitor is there."""
        return self._found[visitor.number][visitor.place] is not None

    def runs(self, index: int) -> list[Run[Partial]]:
        """Where the parts of a segment are, in the order of its visits."""
        runs = [run for run in self._found[index] if run is not None]
        assert len(runs) == len(self.visits[index]), "every visit must have been answered"
        return runs

    def of(self, index: int) -> list[Partial]:
        """The parts of a segment, in the order of its visits."""
        return [part_of([run]) for run in self.runs(index)]

    def merged(self) -> list[Run[Partial]]:
        """All parts of each segment merged, in the order of its visits, whatever else is in the batch.

        Nothing is written to in place, so that gradients flow and parts that others see stay as they are.
        """
        found: list[Run[Partial] | None] = [None] * len(self.segments)
        alike: dict[int, list[int]] = {}
        for index, (segment, visits) in enumerate(zip(self.segments, self.visits, strict=True)):
            if visits and all(_is_even(visit, segment) for visit in visits):
                alike.setdefault(len(visits), []).append(index)
            else:
                found[index] = Run(self._merged_in_stretches(index), 0, segment.length)
        for count, indices in alike.items():
            of_segments = [self.runs(index) for index in indices]
            part = part_of([runs[0] for runs in of_segments])
            for place in range(1, count):
                part = merge(part, part_of([runs[place] for runs in of_segments]))
            start = 0
            for index in indices:
                stop = start + self.segments[index].length
                found[index] = Run(part, start, stop)
                start = stop
        return [run for run in found if run is not None]

    def _merged_in_stretches(self, index: int) -> Partial:
        """Merge the parts of a segment where some are of a run of its queries only, or weigh more than others."""
        visits, length = self.visits[index], self.segments[index].length
        runs = [range(length) if visit.queries is None else visit.queries for visit in visits]
        borders = sorted({0, length, *(edge for run in runs for edge in (run.start, run.stop))})
        number_of = {border: number for number, border in enumerate(borders)}
        # One for each stretch of queries between two borders.
        merged: list[Partial | None] = [None] * (len(borders) - 1)
        for part, visit, run in zip(self.of(index), visits, runs, strict=True):
            if visit.log_weight:
                part = Partial(part.out, part.lse + visit.log_weight)
            for number in range(number_of[run.start], number_of[run.stop]):
                low, high = borders[number] - run.start, borders[number + 1] - run.start
                own = part_of([Run(part, low, high)])
                before = merged[number]
                merged[number] = own if before is None else merge(before, own)
        whole = [
            self.new_empty(high - low) if one is None else one
            for one, (low, high) in zip(merged, pairwise(borders), strict=True)
        ]
        return part_of([Run(one, 0, len(one.lse)) for one in whole]) if whole else self.new_empty(0)


def _is_even(visit: Visit, segment: Segment) -> bool:
    """Whether all queries of the segment make the visit, and it weighs as much as any other."""
    return visit.queries in (None, range(segment.length)) and not visit.log_weight
