"""Window: a query sees the first few tokens and the most recent ones.

The first tokens are kept because softmax attention parks its spare weight on them
(Xiao et al. 2023, arXiv:2309.17453); here they keep their own positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, ClassVar

from pydantic import Field

from plait.errors import ConfigError
from plait.memory.memory import Memory
from plait.memory.plan import Choice, Policy, Visit
from plait.memory.rows import Segment
from plait.memory.strand import Strand

__all__ = ["FirstAndLast", "Window"]

# Old tokens are dropped at least this many at a time, so that the copy that frees them is rare, and
# this many more than are visible are kept, so that a draft can be taken back.
_SLACK = 256


class FirstAndLast(Policy):
    """What policies share that keep the first tokens and the most recent ones, and drop the others."""

    cuts_strands: ClassVar[bool] = True

    @property
    def num_last(self) -> int:
        """Visible positions, the query's own included."""
        raise NotImplementedError

    @property
    def num_first(self) -> int:
        """First tokens of the sequence that stay."""
        raise NotImplementedError

    def visits(self, memory: Memory, segment: Segment) -> Sequence[Visit | Choice]:
        return self.visits_of_held(memory, segment)

    def visits_of_held(self, memory: Memory, segment: Segment) -> list[Visit]:
        """Visits to the first tokens and the window."""
        seen: list[Visit] = []
        for strand, is_first in self._parts(memory, segment):
            if is_first:
                seen += self.visits_of_first(memory, segment, strand)
            else:
                seen.append(Visit(strand, self.window(memory)))
        return seen

    def visits_of_first(self, memory: Memory, segment: Segment, strand: Strand) -> list[Visit]:
        """How the queries see a strand of first tokens."""
        return [Visit(strand, memory.window)]

    def settle(self, memory: Memory) -> None:
        # Split once here rather than at every visit, so that forks visit the same strands.
        memory.strands = [part for strand in memory.strands for part, _ in self._split_at_first(strand)]
        keep_from = self.keep_from(memory, max(len(memory) - _SLACK, 0))
        tail, num_first = memory.tail, self.num_first
        old = [s for s in memory.strands if s.position >= num_first and s.position + len(s) <= keep_from]
        old_in_tail = keep_from - max(tail.position, num_first)
        if sum(map(len, old)) + max(old_in_tail, 0) < _SLACK:
            return
        first = [strand.copied() for strand in memory.strands if strand.position < num_first]
        recent = [s for s in memory.strands if s.position >= num_first and s.position + len(s) > keep_from]
        if old_in_tail > 0:
            if tail.position < num_first:
                first.append(tail.split(num_first - tail.position)[0].copied())
            memory.tail = tail.split(keep_from - tail.position)[1].copied()
        memory.strands = first + recent

    def check_truncate(self, memory: Memory, length: int) -> None:
        dropped = self._dropped(memory)
        window = self.window(memory)
        if length > dropped.start and length - window + 1 < dropped.stop:
            raise ConfigError(
                f"Cannot go back to {length} tokens: {self} has dropped tokens {dropped.start} to "
                f"{dropped.stop - 1}, which the next one would see. Go back to at least "
                f"{dropped.stop + window - 1}, or to at most {dropped.start}."
            )

    def keep_from(self, memory: Memory, length: int) -> int:
        """Position before which no token is read again by a memory of at least `length` tokens."""
        return length - self.window(memory)

    def window(self, memory: Memory) -> int:
        """Visible positions of a layer, which may have a narrower window of its own."""
        return self.num_last if memory.window is None else min(self.num_last, memory.window)

    def _parts(self, memory: Memory, segment: Segment) -> list[tuple[Strand, bool]]:
        """Every strand in parts of which each holds first tokens only, or none of them."""
        if memory.draft is None or segment.position >= self.num_first:
            return [part for strand in memory.all_strands() for part in self._split_at_first(strand)]
        # A tree stands among the first tokens: its nodes are not in the order of positions.
        *before, nodes = memory.all_strands()
        parts: list[tuple[Strand, bool]] = [(strand, True) for strand in before]
        depths = segment.mask.depths(segment.length).tolist()
        positions = [*range(nodes.position, segment.position), *(segment.position + d for d in depths)]
        for is_first, run in groupby(positions, key=lambda position: position < self.num_first):
            part, nodes = nodes.split(len(list(run)))
            parts.append((part, is_first))
        return parts

    def _split_at_first(self, strand: Strand) -> list[tuple[Strand, bool]]:
        """The part of a strand that belongs to the first tokens, and the rest."""
        if strand.position >= self.num_first:
            return [(strand, False)]
        if strand.position + len(strand) <= self.num_first:
            return [(strand, True)]
        front, back = strand.split(self.num_first - strand.position)
        return [(front, True), (back, False)]

    def _dropped(self, memory: Memory) -> range:
        """Positions between the first tokens and the oldest of the others that is held."""
        end = 0
        for strand in memory.all_strands():
            if strand.position > end:
                return range(end, strand.position)
            end = strand.position + len(strand)
        return range(end, end)


@dataclass(frozen=True, kw_only=True)
class Window(FirstAndLast, name="window"):
    """See the last `size` positions and the first `sinks`; forget the rest.

    Exact while the sequence is no longer than `size`. A layer keeps at most `size + sinks + 2 * 256`
    tokens between calls, and room for a quarter more; a strand shared by a fork stays whole until all
    of it is out of sight. Positions grow with the sequence: the distance to the sinks is not limited.
    A model's own sliding window holds too, for the sinks as well.

    Args:
        size: visible positions, the query's own included.
        sinks: first tokens of the sequence that stay visible.
    """

    size: Annotated[int, Field(ge=1)] = 1024
    sinks: Annotated[int, Field(ge=0)] = 4

    @property
    def num_last(self) -> int:
        return self.size

    @property
    def num_first(self) -> int:
        return self.sinks
