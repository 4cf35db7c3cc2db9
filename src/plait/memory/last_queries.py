"""The last queries of one layer of one sequence, for codecs that choose by them what to keep.

Shapes: Q queries, H query heads, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from plait.memory.plan import Notes, Seen

__all__ = ["Asked", "LastQueries"]

# Pending rows that are noted beyond the window, because they may be taken back.
_LONGEST_DRAFT = 128


class Asked(NamedTuple):
    """Queries that follow each other, and what they found.

    Attributes:
        queries: (Q, H, D) fp32, rotated in the tail's frame.
        lse: (Q, H) fp32, the log-sum-exp of the scores of everything they saw.
    """

    queries: Tensor
    lse: Tensor

    def last(self, count: int) -> Asked:
        """The last `count` of them, in the same storage."""
        return Asked(*(rows[-count:] for rows in self))


class LastQueries(Notes):
    """The last queries of the past, and those of rows that may yet be taken back.

    Args:
        window: how many queries to keep.

    Attributes:
        past: of the past; None when there are none or they are not needed any more.
        end: position after the last of them.
        pending: of the last rows that may yet be taken back, such as the nodes of a draft tree.
        pending_end: position after the last of them, every row counted.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.past: Asked | None = None
        self.end = 0
        self.pending: Asked | None = None
        self.pending_end = 0

    @property
    def last(self) -> Asked | None:
        """The last queries, those of pending rows included; None where nothing was read."""
        rows = [rows for rows in (self.past, self.pending) if rows is not None]
        if not rows:
            return None
        return Asked(*map(torch.cat, zip(*rows, strict=True))).last(self.window)

    @property
    def reach(self) -> int:
        """Position after the last query that is noted."""
        return self.end if self.pending is None else self.pending_end

    def add(self, seen: Seen) -> None:
        """Note the queries of pending rows."""
        new = Asked(seen.queries, seen.lse)
        self.pending = _last(self.pending, new, self.window + _LONGEST_DRAFT)
        self.pending_end = seen.segment.position + len(seen.queries)

    def forget(self) -> None:
        """Give up what is noted."""
        self.past = self.pending = None

    def commit(self, kept: Sequence[int], count: int) -> None:
        if self.pending is None:
            return
        first = count - len(self.pending.lse)
        rows = [row - first for row in kept if row >= first]
        if rows:
            new = Asked(*(numbers[rows] for numbers in self.pending))
            self.past = _last(self.past, new, self.window)
            self.end = self.pending_end - count + len(kept)
        self.pending = None

    def fork(self) -> Self:
        return copy.copy(self)

    def check_splice(self) -> None:
        """Moved tokens stand between the queries that are noted and the next ones, and take nothing from them."""

    def splice(self, source: Notes, start: int, stop: int, position: int) -> None:
        # What follows is asked for by the text behind the moved tokens.
        self.forget()

    def truncate(self, length: int) -> None:
        self.pending = _before(self.pending, self.pending_end, length)
        self.pending_end = min(self.pending_end, length)
        self.past = _before(self.past, self.end, length)
        self.end = min(self.end, length)

    def tensors(self) -> list[Tensor]:
        return [tensor for rows in (self.past, self.pending) if rows is not None for tensor in rows]


def _last(older: Asked | None, newer: Asked, count: int) -> Asked:
    """The last `count` rows of both, in storage of their own."""
    kept = []
    with torch.inference_mode(False):
        for index, numbers in enumerate(newer):
            rows = numbers.detach()[-count:].float().clone()
            if older is not None:
                rows = torch.cat([older[index], rows])[-count:].clone()
            kept.append(rows)
    return Asked(*kept)


def _before(rows: Asked | None, end: int, length: int) -> Asked | None:
    """Of rows that end before position `end`, those before position `length`; None for none."""
    left = 0 if rows is None else len(rows.lse) - max(end - length, 0)
    return None if rows is None or left <= 0 else Asked(*(numbers[:left] for numbers in rows))
