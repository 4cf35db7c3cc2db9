"""RSD-C: a tree of fixed shape from a draft model, siblings drawn without replacement.

Source: Jeon et al. 2024, "Recursive Speculative Decoding", arXiv:2402.14160, section 3.2.1. Siblings are
the largest entries of log-law plus Gumbel numbers, best first, which is the order of drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from plait.decode.gumbel import top
from plait.decode.speculate.draft_model import (
    Children,
    DraftModelConfig,
    DraftModelSpeculator,
    Level,
    Reader,
)
from plait.errors import ConfigError

__all__ = ["RSDC", "Branching"]


@dataclass(frozen=True, kw_only=True)
class RSDC(DraftModelConfig, name="rsd-c"):
    """Propose a tree of fixed shape that a draft model draws, no token twice at one place.

    Costs a forward pass of the draft for each level, over the tree so far. Greedy answers are those of
    plain decoding; sampled ones have the model's law.

    Args:
        layers: blocks of a draft that is made of the model's own first blocks and its head.
        branch: children of each node, level by level from the root on.
    """

    branch: tuple[Annotated[int, Field(ge=1, le=64)], ...] = (3, 2, 1, 1)

    def check(self) -> None:
        if not self.branch:
            raise ConfigError(
                "RSDC.branch must name at least one level. Got none; draft none proposes nothing."
            )

    def guess_with(self, reader: Reader) -> DraftModelSpeculator:
        return Branching(reader, self.branch)


class Branching(DraftModelSpeculator):
    """Gives every node of level l `branch[l]` children, fewer where the law or the budget has no more."""

    def __init__(self, reader: Reader, branch: Sequence[int]) -> None:
        super().__init__(reader, len(branch))
        self.branch = branch

    def grow(self, level: Level) -> Children:
        # How many is settled before anything is drawn, or the draws would not have the declared law.
        count = min(self.branch[level.depth], level.room // len(level.log_laws))
        return [(index, int(token)) for index, row in enumerate(level.perturbed) for token in top(row, count)]
