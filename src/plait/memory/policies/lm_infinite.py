"""LM-Infinite: a query sees the first tokens and the most recent ones, none of them further away than was trained.

Paper: Han et al. 2024, arXiv:2308.16137, section 3 (the Lambda-shaped mask and the distance limit). The
style `streaming` is Xiao et al. 2024, arXiv:2309.17453: positions are those inside the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.memory.memory import Memory
from plait.memory.plan import Notes, Visit
from plait.memory.policies.window import FirstAndLast
from plait.memory.rows import Segment
from plait.memory.strand import FrozenStrand, Strand
from plait.ops import Causal, Far

__all__ = ["LMInfinite"]


@dataclass(frozen=True, kw_only=True)
class LMInfinite(FirstAndLast, name="lm-infinite"):
    """See the last `local` positions, and the first `initial` tokens as if they stood `local` positions back.

    No distance is larger than `local`, so a model reads on in constant memory and time a token, however
    long the sequence becomes. What lies between the two is forgotten. A first token that is less than
    `local` back is seen at its true distance, and once. Equal to full attention while the sequence is no
    longer than `local`.

    A layer keeps at most `local + initial + 2 * 256` tokens between calls, and room for a quarter more; the
    first tokens are kept as plain numbers whatever the codec is.

    Args:
        local: visible positions, the query's own included, and the limit of distances. At most the
            length that the model was trained on.
        initial: first tokens of the sequence that stay visible; below `local`.
        style: `lambda` is LM-Infinite. With `streaming` a query counts its distance to the first tokens
            inside the cache: `initial + local - 1` to the very first one, one less to the next, and so on.
    """

    local: Annotated[int, Field(ge=1)] = 2048
    initial: Annotated[int, Field(ge=0)] = 10
    style: Literal["lambda", "streaming"] = "lambda"

    def check(self) -> None:
        if self.initial >= self.local:
            raise ConfigError(
                f"LMInfinite.initial must be below local {self.local}. Got {self.initial}; "
                "raise local, or keep fewer first tokens."
            )

    @property
    def num_last(self) -> int:
        return self.local

    @property
    def num_first(self) -> int:
        # With the style `lambda` they are kept apart, with keys that are not rotated.
        return self.initial if self.style == "streaming" else 0

    @property
    def max_distance(self) -> int:
        return self.local if self.style == "lambda" else self.local + self.initial - 1

    def new_notes(self) -> Notes | None:
        return _First() if self.style == "lambda" and self.initial else None

    def gather(self, memory: Memory) -> None:
        notes = memory.policy_notes
        if isinstance(notes, _First) and notes.length < min(self.initial, len(memory)):
            notes.add(_unrotated(memory, notes.length, self.initial))

    def runs(self, segment: Segment) -> list[range]:
        # First tokens that later rows of the segment see as far away are read before those, so that they are written.
        count, length = self.initial - segment.position, segment.length
        if type(segment.mask) is not Causal or self.style != "lambda" or not 0 < count < length:
            return super().runs(segment)
        is_far = segment.position + length > self.local
        return [range(count), range(count, length)] if is_far else super().runs(segment)

    def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
        notes = memory.policy_notes
        # A layer whose own window is no wider than `local` sees no further.
        if not isinstance(notes, _First) or not self._reaches(memory, segment):
            return self.visits_of_held(memory, segment)
        first = [] if notes.strand is None else [notes.strand]
        if notes.length < self.initial:
            first += self._pending_first(memory, segment, notes.length)
        # Once the window has left the first tokens, the segment's own mask shows all of them to every query.
        is_past = notes.length == self.initial and segment.position >= self.initial - 1 + self.local
        mask = None if is_past else Far(segment.mask, self.local, segment.length)
        far = [Visit(strand, memory.window, mask, turned_at=self.local) for strand in first]
        return far + self.visits_of_held(memory, segment)

    def visits_of_first(self, memory: Memory, segment: Segment, strand: Strand) -> list[Visit]:
        depths = segment.mask.depths(segment.length).tolist()
        seen = []
        start = 0
        for is_late, run in groupby(depths, key=lambda depth: segment.position + depth > self.max_distance):
            stop = start + len(list(run))
            pinned = self.max_distance if is_late else None
            queries = range(start, stop) if stop - start < segment.length else None
            seen.append(Visit(strand, memory.window, turned_at=pinned, queries=queries))
            start = stop
        return seen

    def _reaches(self, memory: Memory, segment: Segment) -> bool:
        """Whether a query of the segment is far enough from the first token."""
        if (memory.window is not None and memory.window <= self.local) or not segment.length:
            return False
        return segment.position + int(segment.mask.depths(segment.length).max()) >= self.local

    def _pending_first(self, memory: Memory, segment: Segment, start: int) -> list[FrozenStrand]:
        """First tokens among the pending rows, unrotated: a long chunk may look far back inside itself."""
        if memory.draft is None:
            return [_unrotated(memory, start, self.initial)]
        nodes = memory.tail.split(start - memory.tail.position)[1]
        positions = segment.position + segment.mask.depths(segment.length)
        strands = []
        for is_first, run in groupby(positions.tolist(), key=lambda position: position < self.initial):
            count = len(list(run))
            part, nodes = nodes.split(count)
            if is_first:
                strands.append(part.turned_back(positions[:count]))
            positions = positions[count:]
        return strands


class _First(Notes):
    """The first tokens that were committed, with keys that are not rotated."""

    method: ClassVar[str] = "lm-infinite"

    def __init__(self, strand: FrozenStrand | None = None) -> None:
        self.strand = strand

    @property
    def length(self) -> int:
        return 0 if self.strand is None else len(self.strand)

    def add(self, strand: FrozenStrand) -> None:
        self.strand = FrozenStrand.gathered([strand] if self.strand is None else [self.strand, strand])

    def fork(self) -> _First:
        return _First(self.strand)

    def truncate(self, length: int) -> None:
        if self.strand is not None and length < len(self.strand):
            self.strand = self.strand.split(length)[0] if length else None

    def tensors(self) -> list[Tensor]:
        return [] if self.strand is None else self.strand.tensors()


def _unrotated(memory: Memory, start: int, stop: int) -> FrozenStrand:
    """Tokens of the tail from position `start` up to `stop`, or its end, with keys turned back."""
    rows = memory.tail.split(start - memory.tail.position)[1]
    return rows.split(min(stop - start, len(rows)))[0].turned_back()
