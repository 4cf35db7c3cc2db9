"""What a native program writes and reads of one past, as tables of whole numbers that last while its strands do.

Shapes: L layers, V visits, C choices and O observed layers of all layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from plait.memory import Choice, Memory, Past, Segment, Strand, Visit
from plait.memory.strand import DenseStrand, Heads, Layout
from plait.ops import Causal, Everything, Far, Mask, Rope, Tree

__all__ = ["CHOICE_COLUMNS", "OBSERVED_COLUMNS", "TARGET_COLUMNS", "VISIT_COLUMNS", "Frame", "PastTables"]

_Numbers = npt.NDArray[np.int64]

TARGET_COLUMNS, VISIT_COLUMNS, CHOICE_COLUMNS, OBSERVED_COLUMNS = 10, 25, 13, 5
# Columns that change from one forward pass to the next: of targets, of all others, and of visits to tails.
_AT, _TARGET_TABLE = 7, 9
_SEGMENT, _TABLE = 1, 2
_STANDS_AT, _POSITION, _LENGTH = 13, 23, 24
# Stands for the end of a run of queries that reaches as far as there are any.
_ALL = 2**62


class Frame(NamedTuple):
    """Which angles turn a row: those of its position from `offset` on, or those of one position for all rows."""

    rope: Rope
    offset: int
    is_pinned: bool


class _Layer(NamedTuple):
    """What a layer's memory held when its tables were made, and the visits, whose strands the tables keep alive."""

    memory: Memory
    tail: DenseStrand
    layout: Layout
    strands: list[Strand]
    key: Hashable | None
    looks: Sequence[Visit | Choice]


class PastTables:
    """Where the new rows of one past go, and which strands they visit, layer by layer.

    Attributes:
        targets: (L, 10), the strand of each layer that new rows are written to.
        visits: (V, 25), the strands that they visit, by layer and oldest first.
        choices: (C, 13), what the rows choose from, by layer and place among its visits.
        observed: (O, 5), the layers that are told of their queries; addresses are left to the caller.
        frames: whose tables of angles they ask for; see `number`.
        is_lasting: whether they can serve the next forward pass too, if strands stay the same.
    """

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.targets, self.visits = _rows([], TARGET_COLUMNS), _rows([], VISIT_COLUMNS)
        self.choices, self.observed = _rows([], CHOICE_COLUMNS), _rows([], OBSERVED_COLUMNS)
        self.is_lasting = True
        self._layers: list[_Layer] = []
        # Numbers of the layers, with their memories, that may want to be told of queries.
        self._observers: list[tuple[int, Memory]] = []
        # What visits are made of, whose addresses the tables have.
        self._visited: list[Strand] = []
        self._capacity = 0
        # Of each row of a table, its frame; and the visits to tails.
        self._target_frames: _Numbers = np.zeros(0, np.int64)
        self._visit_frames: _Numbers = np.zeros(0, np.int64)
        self._choice_frames: _Numbers = np.zeros(0, np.int64)
        self._tails: _Numbers = np.zeros(0, np.int64)

    @classmethod
    def made(cls, past: Past, segment: Segment, heads: Sequence[Heads]) -> Self | None:
        """Make room for a segment's rows in every layer, and note what they visit.

        Returns:
            None for a strand or a visit of a kind that the program does not have; rows are pending in some
            layers then.
        """
        self = cls()
        draft = segment.mask if isinstance(segment.mask, Tree) else None
        targets: list[int] = []
        visits: list[int] = []
        choices: list[int] = []
        target_frames: list[int] = []
        visit_frames: list[int] = []
        choice_frames: list[int] = []
        tails: list[int] = []
        for layer, (memory, own) in enumerate(zip(past.layers, heads, strict=True)):
            assert isinstance(memory, Memory)
            rope = own.rope
            first = memory.extend(segment.length, draft)
            at = memory.tail.layout
            if at is None:
                return None
            targets += (*at[:7], first, at.number, -1)
            target_frames.append(self._frame(rope, memory.tail.offset, False))
            looks = memory.plan.policy.visits(memory, segment)
            num_choices = 0
            for number, look in enumerate(looks):
                kind = _kind_of(look, segment)
                if kind is None:
                    return None
                if isinstance(look, Choice):
                    places = look.places
                    if places is None or (draft is not None and kind[0] < 0):
                        return None
                    choice_frames.append(self._frame(rope, look.turned_at, True))
                    choices += (layer, 0, -1, look.window or 0, *kind, number - num_choices)
                    choices += (look.index.data_ptr(), len(look.index), places.data_ptr(), len(look.found))
                    choices += (look.found.ctypes.data, look.turned_at)
                    num_choices += 1
                    continue
                strands, weight = _weighed(look, len(visit_frames) + 1)
                queries = range(_ALL) if look.queries is None else look.queries
                for strand in strands:
                    place = strand.place
                    if place is None:
                        return None
                    if strand is memory.tail:
                        tails.append(len(visit_frames))
                    offset = strand.offset if look.turned_at is None else look.turned_at
                    visit_frames.append(self._frame(rope, offset, look.turned_at is not None))
                    visits += (layer, 0, -1, look.window or 0, *kind, queries.start, queries.stop, *weight)
                    visits += (*_standing(look, strand, own), *place)
                self._visited += strands
            if memory.plan.may_observe:
                self._observers.append((layer, memory))
            key = memory.plan.policy.visits_key(memory, segment)
            self._layers.append(_Layer(memory, memory.tail, at, list(memory.strands), key, looks))
        self.is_lasting = all(layer.key is not None for layer in self._layers)
        self.is_lasting &= 0 < len(tails) == len(self._layers)
        self._capacity = min((layer.layout.capacity for layer in self._layers), default=0)
        self.targets, self.visits = _rows(targets, TARGET_COLUMNS), _rows(visits, VISIT_COLUMNS)
        self.choices = _rows(choices, CHOICE_COLUMNS)
        self._target_frames = np.array(target_frames, dtype=np.int64)
        self._visit_frames = np.array(visit_frames, dtype=np.int64)
        self._choice_frames = np.array(choice_frames, dtype=np.int64)
        self._tails = np.array(tails, dtype=np.int64)
        return self

    def extended(self, segment: Segment) -> bool:
        """Make room for the next rows, if every strand is where it was; else nothing is changed."""
        first = self._layers[0].tail.length
        if first + segment.length > self._capacity:
            return False
        for memory, tail, layout, strands, key, _ in self._layers:
            if memory.tail is not tail or tail.layout is not layout or tail.length != first:
                return False
            if memory.pending or memory.strands != strands:
                return False
            if memory.plan.policy.visits_key(memory, segment) != key:
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
        self.visits[:, _TABLE] = numbers[self._visit_frames]
        self.choices[:, _TABLE] = numbers[self._choice_frames]
        told = [layer for layer, memory in self._observers if memory.is_observed]
        self.observed = _rows([0] * (len(told) * OBSERVED_COLUMNS), OBSERVED_COLUMNS)
        self.observed[:, 0] = told
        self.observed[:, _TABLE] = self.targets[told, _TARGET_TABLE]
        for table in (self.visits, self.choices, self.observed):
            table[:, _SEGMENT] = segment

    @staticmethod
    def joined(parts: Sequence[PastTables]) -> tuple[_Numbers, _Numbers, _Numbers, _Numbers]:
        """Targets, visits, choices and what is observed, of all segments: by layer, then by segment."""
        if len(parts) == 1:
            return parts[0].targets, parts[0].visits, parts[0].choices, parts[0].observed
        if not parts:
            empty = PastTables()
            return empty.targets, empty.visits, empty.choices, empty.observed
        targets = np.stack([part.targets for part in parts], axis=1).reshape(-1, TARGET_COLUMNS)
        visits, choices, observed = (
            _by_layer([getattr(part, name) for part in parts]) for name in ("visits", "choices", "observed")
        )
        return targets, visits, choices, observed

    @staticmethod
    def reach(parts: Sequence[PastTables], segments: Sequence[Segment]) -> int:
        """A distance that none of the visits goes beyond, in either direction."""
        most = max((segment.position + segment.length for segment in segments), default=0)
        for part in parts:
            for table, columns in ((part.visits, (_STANDS_AT, _POSITION, _LENGTH)), (part.choices, (-1,))):
                for column in columns:
                    most += int(np.abs(table[:, column]).max(initial=0))
        return most

    def _frame(self, rope: Rope | None, offset: int, is_pinned: bool) -> int:
        if rope is None:
            return -1
        frame = Frame(rope, offset, is_pinned)
        if frame not in self.frames:
            self.frames.append(frame)
        return self.frames.index(frame)


def _kind_of(look: Visit | Choice, segment: Segment) -> tuple[int, int] | None:
    """The kind of a visit's mask, -1 for the segment's own, and the nearest distance seen; None for another mask."""
    mask: Mask | None = look.mask
    if mask is None:
        return -1, 0
    if type(mask) is Everything:
        return 0, 0
    if type(mask) is Causal:
        return 1, 0
    if type(mask) is Far and mask.base == segment.mask:
        # A strand that reaches into the new rows holds turned copies of them, made before the program has written any.
        is_past = isinstance(look, Choice) or look.strand.position + len(look.strand) <= segment.position
        return (-1, mask.distance) if is_past else None
    return None


def _weighed(look: Visit, number: int) -> tuple[list[Strand], tuple[int, int, int, int]]:
    """The strands of a visit, and how it counts: what is added, its group, and the group's factors."""
    group = look.strand.group
    if group is None:
        return [look.strand], (_bits(look.log_weight), 0, *_ONES)
    return list(group.strands), (
        _bits(look.log_weight / group.share),
        number,
        _bits(1 / group.temperature),
        _bits(group.share),
    )


def _standing(look: Visit, strand: Strand, heads: Heads) -> tuple[int, int]:
    """How queries stand for a bias by distance: each at its place (0), all at one (1), or at one distance of all keys (2)."""
    if heads.bias is None or look.turned_at is None:
        return 0, 0
    return (2, look.turned_at) if strand.heads.bias is None else (1, strand.offset + look.turned_at)


def _bits(number: float) -> int:
    """The bits of a number in fp64."""
    return int(np.float64(number).view(np.int64))


_ONES = (_bits(1.0), _bits(1.0))


def _rows(numbers: Sequence[int], columns: int) -> _Numbers:
    return np.array(numbers, dtype=np.int64).reshape(-1, columns)


def _by_layer(tables: Sequence[_Numbers]) -> _Numbers:
    tables = [table for table in tables if len(table)] or tables[:1]
    if len(tables) == 1:
        return tables[0]
    joined = np.concatenate(tables)
    order: npt.NDArray[Any] = np.argsort(joined[:, 0], kind="stable")
    return joined[order]
