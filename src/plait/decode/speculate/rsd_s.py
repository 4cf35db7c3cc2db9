"""RSD-S: the likeliest sequences of a draft model by stochastic beam search, as one tree.

Sources: Jeon et al. 2024, "Recursive Speculative Decoding", arXiv:2402.14160, section 3.2.2; Kool et al.
2019, arXiv:1903.06059, algorithm 1. In their letters, phi is the log-probability of a sequence and psi its
perturbed value; the root has 0 for both.

The beam is cut by psi, never by phi: given the siblings drawn before it, which token a child is does not
depend on its psi, so a child that survives still has the law that the verifier is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from plait.decode.gumbel import conditioned_on_maximum, top
from plait.decode.speculate.draft_model import (
    Children,
    DraftModelConfig,
    DraftModelSpeculator,
    Level,
    Reader,
)

__all__ = ["RSDS"]


@dataclass(frozen=True, kw_only=True)
class RSDS(DraftModelConfig, name="rsd-s"):
    """Propose the sequences that survive a stochastic beam search of a draft model.

    Spends its nodes where the draft is sure: the shape of the tree follows the draft's laws. Costs a
    forward pass of the draft for each level, over the tree so far. Greedy answers are those of plain
    decoding, from an ordinary beam search; sampled ones have the model's law.

    Args:
        layers: blocks of a draft that is made of the model's own first blocks and its head.
        width: sequences kept at each level.
        depth: levels, that is most tokens accepted at once.
    """

    width: Annotated[int, Field(ge=1, le=64)] = 4
    depth: Annotated[int, Field(ge=1, le=16)] = 4

    def guess_with(self, reader: Reader) -> DraftModelSpeculator:
        return _StochasticBeam(reader, self.width, self.depth)


class _StochasticBeam(DraftModelSpeculator):
    def __init__(self, reader: Reader, width: int, depth: int) -> None:
        super().__init__(reader, depth)
        self.width = width
        self.phi = np.zeros(1)
        self.psi = np.zeros(1)

    def grow(self, level: Level) -> Children:
        if level.depth == 0:
            self.phi, self.psi = np.zeros(1), np.zeros(1)
        width = min(self.width, level.room)
        nodes, tokens, phis, psis = [], [], [], []
        for node, row in enumerate(level.log_laws):
            phi = self.phi[node] + row
            psi = phi
            if level.gumbel is not None:
                psi = conditioned_on_maximum(phi + level.gumbel[node], self.psi[node])
            for token in top(psi, width):
                nodes.append(node)
                tokens.append(int(token))
                phis.append(phi[token])
                psis.append(psi[token])
        # Best first, so siblings stand in the order in which they were drawn.
        kept = top(np.array(psis), width)
        self.phi, self.psi = np.array(phis)[kept], np.array(psis)[kept]
        return [(nodes[place], tokens[place]) for place in kept.tolist()]
