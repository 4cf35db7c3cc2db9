"""A chain of guesses from a draft model: plain speculative decoding.

Sources: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from plait.decode.speculate.draft_model import DraftModelConfig, DraftModelSpeculator, Reader
from plait.decode.speculate.rsd_c import Branching

__all__ = ["Chain"]


@dataclass(frozen=True, kw_only=True)
class Chain(DraftModelConfig, name="chain"):
    """Propose the next few tokens that a draft model draws, one after the other.

    Costs a forward pass of the draft for each token. Greedy answers are those of plain decoding; sampled
    ones have the model's law.

    Args:
        layers: blocks of a draft that is made of the model's own first blocks and its head.
        tokens: most tokens proposed at once.
    """

    tokens: Annotated[int, Field(ge=1, le=64)] = 4

    def guess_with(self, reader: Reader) -> DraftModelSpeculator:
        return Branching(reader, [1] * self.tokens)
