"""Window: a query sees the first few tokens and the most recent ones.

The first tokens are kept because softmax attention parks its spare weight on them
(Xiao et al. 2023, arXiv:2309.17453); here they keep their own positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

from pydantic import Field

from plait.errors import ConfigError
from plait.memory.memory import Memory
from plait.memory.plan import Policy, Visit
from plait.memory.rows import Segment
from plait.memory.strand import Strand

__all__ = ["Window"]

# Old tokens are dropped at least this many at a time, so that the copy that frees them is rare, and
# this many more than are visible are kept, so that a draft can be taken back.
_SLACK = 256


@dataclass(frozen=True, kw_only=True)
class Window(Policy, name="window"):
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

    def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
        if memory.draft is not None and segment.position < self.sinks:
            return self._visits_of_draft(memory, segment)
        seen = []
        for strand in memory.all_strands():
            front, back = self._split_at_sinks(strand)
            if front is not None:
                seen.append(Visit(front, memory.window))
            if back is not None:
                seen.append(Visit(back, self._window(memory)))
        return seen

    def settle(self, memory: Memory) -> None:
        # Split once here rather than at every visit, so that forks visit the same strands.
        memory.strands = [
            part for strand in memory.strands for part in self._split_at_sinks(strand) if part is not None
        ]
        keep_from = len(memory) - self._window(memory) - _SLACK
        tail = memory.tail
        old = [s for s in memory.strands if s.position >= self.sinks and s.position + len(s) <= keep_from]
        old_in_tail = keep_from - max(tail.position, self.sinks)
        if sum(map(len, old)) + max(old_in_tail, 0) < _SLACK:
            return
        sinks = [strand.copied() for strand in memory.strands if strand.position < self.sinks]
        recent = [s for s in memory.strands if s.position >= self.sinks and s.position + len(s) > keep_from]
        if old_in_tail > 0:
            if tail.position < self.sinks:
                sinks.append(tail.split(self.sinks - tail.position)[0].copied())
            memory.tail = tail.split(keep_from - tail.position)[1].copied()
        memory.strands = sinks + recent

    def check_truncate(self, memory: Memory, length: int) -> None:
        dropped = self._dropped(memory)
        window = self._window(memory)
        if length > dropped.start and length - window + 1 < dropped.stop:
            raise ConfigError(
                f"Cannot go back to {length} tokens: {self} has dropped tokens {dropped.start} to "
                f"{dropped.stop - 1}, which the next one would see. Go back to at least "
                f"{dropped.stop + window - 1}, or to at most {dropped.start}."
            )

    def _window(self, memory: Memory) -> int:
        return self.size if memory.window is None else min(self.size, memory.window)

    def _visits_of_draft(self, memory: Memory, segment: Segment) -> list[Visit]:
        """Visits while a tree stands among the first tokens: its nodes are not in the order of positions."""
        *seen, rest = [Visit(strand, memory.window) for strand in memory.all_strands()]
        depths = segment.mask.depths(segment.length).tolist()
        positions = [*range(rest.strand.position, segment.position), *(segment.position + d for d in depths)]
        nodes = rest.strand
        for is_first, run in groupby(positions, key=lambda position: position < self.sinks):
            part, nodes = nodes.split(len(list(run)))
            seen.append(Visit(part, memory.window if is_first else self._window(memory)))
        return seen

    def _split_at_sinks(self, strand: Strand) -> tuple[Strand | None, Strand | None]:
        """The part of a strand that belongs to the first tokens, and the rest."""
        if strand.position >= self.sinks:
            return None, strand
        if strand.position + len(strand) <= self.sinks:
            return strand, None
        return strand.split(self.sinks - strand.position)

    def _dropped(self, memory: Memory) -> range:
        """Positions between the first tokens and the oldest of the others that is held."""
        end = 0
        for strand in memory.all_strands():
            if strand.position > end:
                return range(end, strand.position)
            end = strand.position + len(strand)
        return range(end, end)
