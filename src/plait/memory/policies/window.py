"""Window: a query sees the first few tokens and the most recent ones.

The first tokens are kept because softmax attention parks its spare weight on them
(Xiao et al. 2023, arXiv:2309.17453); here they keep their own positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from plait.memory.memory import Memory
from plait.memory.plan import Policy, Visit
from plait.memory.rows import Segment
from plait.memory.strand import DenseStrand

__all__ = ["Window"]

# Old tokens are dropped this many at a time, so that the copy that frees them is rare.
_SLACK = 256


@dataclass(frozen=True, kw_only=True)
class Window(Policy, name="window"):
    """See the last `size` positions and the first `sinks`; forget the rest.

    Exact while the sequence is no longer than `size`. Bytes of a layer stay below those of
    `size + sinks + 2 * 256` tokens between calls. It does not limit the distance to the sinks, so
    positions grow with the sequence.

    Args:
        size: visible positions, the query's own included.
        sinks: first tokens of the sequence that stay visible.
    """

    size: Annotated[int, Field(ge=1)] = 1024
    sinks: Annotated[int, Field(ge=0)] = 4

    def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
        window = self.size if memory.window is None else min(self.size, memory.window)
        seen = []
        for strand in memory.all_strands():
            first = min(max(self.sinks - strand.position, 0), len(strand))
            front, back = strand.split(first) if first else (None, strand)
            if front is not None:
                seen.append(Visit(front, memory.window))
            if len(back):
                seen.append(Visit(back, window))
        return seen

    def settle(self, memory: Memory) -> None:
        keep_from = len(memory) - self.size - _SLACK
        if keep_from - memory.tail.position < _SLACK + self.sinks:
            return
        sinks = [strand for strand in memory.strands if strand.position < self.sinks]
        if memory.tail.position < self.sinks:
            sinks.append(memory.tail.split(self.sinks - memory.tail.position)[0].copied())
        _, recent = memory.tail.split(keep_from - memory.tail.position)
        memory.strands = sinks
        memory.tail = recent.copied()
        assert isinstance(memory.tail, DenseStrand)
