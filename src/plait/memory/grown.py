"""What a method keeps of a growing sequence: rows for its blocks, scores of its tokens, queries that were asked.

Shapes: H query heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Asked", "GrownRows", "TokenScores"]


class Asked(NamedTuple):
    """Queries: rotated (n, H, D), the log-sum-exp (n, H) of all they saw, positions (n,)."""

    queries: Tensor
    lse: Tensor
    positions: Tensor

    @classmethod
    def joined(cls, several: Sequence[Asked]) -> Asked:
        return several[0] if len(several) == 1 else cls(*map(torch.cat, zip(*several, strict=True)))

    def some(self, rows: slice | Tensor | list[int]) -> Asked:
        return Asked(self.queries[rows], self.lse[rows], self.positions[rows])

    @staticmethod
    def count(several: Sequence[Asked]) -> int:
        return sum(len(asked.positions) for asked in several)

    @classmethod
    def before(cls, several: Sequence[Asked], length: int) -> list[Asked]:
        """Those at positions below `length`."""
        kept = [(asked, asked.positions < length) for asked in several]
        return [asked.some(rows) for asked, rows in kept if bool(rows.any())]


class GrownRows:
    """Rows of numbers, all of one shape and dtype, in storage that grows by a quarter at a time."""

    def __init__(self) -> None:
        self.storage = torch.empty(0)
        self.length = 0

    @property
    def numbers(self) -> Tensor:
        return self.storage[: self.length]

    def append(self, row: Tensor) -> None:
        if self.length == len(self.storage):
            with torch.inference_mode(False):
                new = row.new_zeros(max(16, self.length * 5 // 4), *row.shape)
            if self.length:
                new[: self.length] = self.numbers
            self.storage = new
        self.storage[self.length] = row
        self.length += 1

    def truncate(self, length: int) -> None:
        """Keep the first rows only."""
        self.length = min(self.length, length)

    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""
        return [self.storage]

    def fork(self) -> GrownRows:
        twin = GrownRows()
        with torch.inference_mode(False):
            twin.storage, twin.length = self.numbers.clone(), self.length
        return twin


class TokenScores:
    """The attention paid to every token that is held, by each query head: (H, T)."""

    def __init__(self) -> None:
        self.storage = torch.empty(0, 0)
        self.start = 0
        self.length = 0

    def extend(self, num_heads: int, stop: int) -> None:
        """Make room for tokens before position `stop`."""
        wanted = stop - self.start
        if wanted > self.storage.shape[1]:
            with torch.inference_mode(False):
                new = torch.zeros(num_heads, max(wanted * 5 // 4, 32))
            if self.length:
                new[:, : self.length] = self.storage[:, : self.length]
            self.storage = new
        self.length = max(self.length, wanted)

    def add(self, position: int, mass: Tensor) -> None:
        first = position - self.start
        self.storage[:, first : first + mass.shape[1]] += mass

    def of(self, position: int, count: int) -> Tensor:
        first = position - self.start
        return self.storage[:, first : first + count]

    def truncate(self, length: int) -> None:
        # Past the last token all is zero, so that the next one there starts from nothing.
        kept = max(length - self.start, 0)
        self.storage[:, kept:] = 0.0
        self.length = min(self.length, kept)
        if length < self.start:
            self.start = length

    def drop_before(self, position: int) -> None:
        dropped = position - self.start
        if dropped > 0:
            with torch.inference_mode(False):
                self.storage = self.storage[:, dropped : self.length].clone()
            self.start, self.length = position, self.storage.shape[1]

    def fork(self) -> TokenScores:
        twin = TokenScores()
        with torch.inference_mode(False):
            twin.storage = self.storage.clone()
        twin.start, twin.length = self.start, self.length
        return twin
