"""PrFlash: a block of queries sees each earlier block of keys with a probability that falls with their distance.

After Li 2024, arXiv:2410.18441 (probabilistic block attention); families, sinks and the budget are our reading.
Shapes: I and J number blocks of queries and keys.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.memory.memory import Memory
from plait.memory.plan import Policy, Visit
from plait.memory.rows import Segment
from plait.ops import Causal, Tree

__all__ = ["PrFlash"]

_WORD = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class PrFlash(Policy, name="prflash"):
    """See some blocks of the past, drawn once: near ones often, far ones seldom. What is not drawn is not read.

    The draw depends on the seed, the layer and the two blocks alone, so it is the same in any chunking, for
    drafts and in every run. Nothing is dropped: memory grows as with full attention, and time a token with
    the number of blocks that are kept. Loses quality on a model that was not trained with it; in training
    (`plait train --memory`) every step has draws of its own.

    Parallel contexts are seen whole, because blocks of their positions are not one run of tokens.

    Args:
        block: tokens of a block of queries or keys.
        p: probability of the block `d` blocks back, d >= 0: `harmonic` 1 / (1 + d), `power` (1 + d)^-rate,
            `geometric` rate^d, or `floor`, the rate at every distance but 0.
        rate: the number in those rules; above 0 and, but for `power`, at most 1.
        near: newest blocks that are always seen, the query's own included.
        sink_blocks: first blocks that are always seen.
        mode: `budget` keeps in every row as many blocks as are expected, rounded up, drawn without
            replacement (Gumbel-top-k); `bernoulli` draws each block by itself.
        correct: with `bernoulli`, weigh a kept block by 1 / p, as importance sampling would.
        seed: of the draws.
    """

    block: Annotated[int, Field(ge=1)] = 64
    p: Literal["harmonic", "power", "geometric", "floor"] = "harmonic"
    rate: Annotated[float, Field(gt=0)] = 0.5
    near: Annotated[int, Field(ge=1)] = 1
    sink_blocks: Annotated[int, Field(ge=0)] = 1
    mode: Literal["bernoulli", "budget"] = "budget"
    correct: bool = False
    seed: Annotated[int, Field(ge=0)] = 0

    def check(self) -> None:
        if self.p in ("geometric", "floor") and self.rate > 1:
            raise ConfigError(f"PrFlash.rate must be in (0, 1] with p={self.p}. Got {self.rate}.")
        if self.correct and self.mode != "bernoulli":
            raise ConfigError(
                "PrFlash.correct needs mode=bernoulli; with a budget no block has a known weight."
            )

    def redrawn(self, number: int) -> PrFlash:
        # The draws of this policy itself are those of use, and of measurements.
        return dataclasses.replace(self, seed=self.seed + 1 + number)

    def probabilities(self, row: int) -> Tensor:
        """Probability (I + 1,), float64, that row I keeps each of blocks 0 to I; 1 for those always kept."""
        back = torch.arange(row, -1, -1, dtype=torch.float64)
        law = {
            "harmonic": lambda: 1 / (1 + back),
            "power": lambda: (1 + back) ** -self.rate,
            "geometric": lambda: self.rate**back,
            "floor": lambda: torch.full_like(back, self.rate),
        }[self.p]()
        law[max(row + 1 - self.near, 0) :] = 1.0
        law[: self.sink_blocks] = 1.0
        return law

    def kept(self, layer: int, row: int) -> tuple[int, ...]:
        """Blocks of keys that block `row` of queries sees in a layer, in order; its own is the last."""
        return _kept(self, layer, row)

    def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
        depths = segment.mask.depths(segment.length).tolist()
        blocks = [(segment.position + depth) // self.block for depth in depths]
        seen: list[Visit] = []
        start = 0
        for row, run in groupby(blocks):
            first, start = start, start + len(list(run))
            # A run that is the whole segment needs no cut, as in decoding.
            queries = range(first, start) if start - first < segment.length else None
            # Parallel contexts share positions and cannot be cut into blocks: they are seen whole.
            whole = (strand for strand in memory.all_strands() if not strand.is_divisible)
            seen += (Visit(strand, memory.window, queries=queries) for strand in whole)
            for low, high, weight in self._spans(memory.layer, row):
                # Only in a plain run of tokens are the segment's own keys in the order of positions.
                stop = high if type(segment.mask) is Causal else min(high, segment.position)
                seen += _between(memory, low, stop, queries, weight)
            if type(segment.mask) is not Causal:
                seen += self._own(memory, segment, row, queries, blocks)
        return seen

    def _spans(self, layer: int, row: int) -> Iterator[tuple[int, int, float]]:
        """Positions [low, high) of neighbouring blocks that a row keeps, and what is added to their scores."""
        law = self.probabilities(row).tolist() if self.correct else None
        weighed = [(block, 0.0 if law is None else -math.log(law[block])) for block in self.kept(layer, row)]
        # Neighbours of equal weight differ from their place in the list by the same number.
        for (_, weight), group in groupby(
            enumerate(weighed), key=lambda item: (item[1][0] - item[0], item[1][1])
        ):
            run = [block for _, (block, _) in group]
            yield run[0] * self.block, (run[-1] + 1) * self.block, weight

    def _own(
        self, memory: Memory, segment: Segment, row: int, queries: range | None, blocks: list[int]
    ) -> Iterator[Visit]:
        """Visits to the segment's own keys where they are not a plain run: the nodes of a tree, block by block."""
        law = self.probabilities(row)
        kept = set(self.kept(memory.layer, row))
        start = segment.position
        for block, run in groupby(blocks):
            stop = start + len(list(run))
            # Rows that see each other in both directions have blocks ahead, of which the rule says nothing.
            if block in kept or not isinstance(segment.mask, Tree):
                weight = -math.log(float(law[block])) if self.correct and block <= row else 0.0
                yield from _between(memory, start, stop, queries, weight)
            start = stop


def _between(memory: Memory, start: int, stop: int, queries: range | None, weight: float) -> Iterator[Visit]:
    """Visits to the keys that are held in the place of positions [start, stop)."""
    for strand in memory.all_strands():
        low, high = max(start - strand.position, 0), min(stop - strand.position, len(strand))
        if low < high and strand.is_divisible:
            part = strand if high == len(strand) else strand.split(high)[0]
            part = part.split(low)[1] if low else part
            yield Visit(part, memory.window, queries=queries, log_weight=weight)


# Rows of a prompt are asked for once for each piece of it, and a row of decoding for each of its tokens.
@functools.lru_cache(maxsize=4096)
def _kept(policy: PrFlash, layer: int, row: int) -> tuple[int, ...]:
    law = policy.probabilities(row)
    draws = _uniform(policy.seed, layer, row)
    always = law == 1.0
    if policy.mode == "bernoulli":
        chosen = always | (draws < law)
    else:
        # The sum is rounded first, so that the order of its terms cannot change the budget.
        count = min(row + 1, math.ceil(round(float(law.sum()), 9)))
        keys = (law.log() - (-draws.log()).log()).masked_fill(always, math.inf)
        chosen = always.scatter(0, keys.topk(max(count, int(always.sum()))).indices, True)
    return tuple(chosen.nonzero().flatten().tolist())


def _uniform(seed: int, layer: int, row: int) -> Tensor:
    """A number in (0, 1), float64, for each of blocks 0 to `row`: SplitMix64 (Steele et al. 2014) of its counters."""
    key = 0
    for part in (seed, layer, row):
        key = _mixed_int((key + part + 1) * 0x9E3779B97F4A7C15 & _WORD)
    signed = key - 2**64 if key >= 2**63 else key
    words = torch.arange(1, row + 2) * -0x61C8864680B583EB + signed  # the golden gamma, as a signed word
    words = (words ^ _shifted(words, 30)) * -0x40A7B892E31B1A47
    words = (words ^ _shifted(words, 27)) * -0x6B2FB644ECCEEE15
    words = words ^ _shifted(words, 31)
    return (_shifted(words, 11).double() + 0.5) * 2.0**-53


def _mixed_int(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def _shifted(words: Tensor, by: int) -> Tensor:
    """A logical shift to the right of 64-bit words, which torch keeps as signed numbers."""
    return (words >> by) & (2 ** (64 - by) - 1)
