"""Prompt look-up: propose what followed the last few tokens where they occurred before.

Source: Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, arXiv:2304.04487. Pays when the answer
copies from its context: editing, extraction, summaries, code completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from plait.decode.speculate.base import Speculator, SpeculatorConfig
from plait.decode.speculate.tree import Context, Tree

__all__ = ["PromptLookup"]


@dataclass(frozen=True, kw_only=True)
class PromptLookup(SpeculatorConfig, name="prompt-lookup"):
    """Propose the continuation of the most recent earlier occurrence of the last `match` tokens.

    Needs no second model. Costs the rows it adds to the forward pass; after a guess of which nothing
    was right it proposes nothing for `patience` tokens.

    Args:
        match: longest run of last tokens that is looked up; shorter runs down to 2 are tried after it.
        tokens: most tokens proposed at once.
        patience: tokens to wait after a failed guess.
    """

    match: Annotated[int, Field(ge=2, le=16)] = 4
    tokens: Annotated[int, Field(ge=1, le=64)] = 8
    patience: Annotated[int, Field(ge=0)] = 4

    def build(self) -> Speculator:
        return _Lookup(self)


class _Lookup(Speculator):
    def __init__(self, config: PromptLookup) -> None:
        self.config = config
        # Where the run that ends just before each position was seen last.
        self.after: dict[tuple[int, ...], int] = {}
        self.indexed = 0
        self.resume_at = 0
        self.has_guessed = False

    def propose(self, context: Context) -> Tree:
        tokens = context.tokens
        self.has_guessed = False
        self._index(tokens)
        count = min(self.config.tokens, context.budget)
        if count < 1 or len(tokens) < self.resume_at:
            return Tree.root(tokens[-1])
        for length in range(self.config.match, 1, -1):
            start = self.after.get(tuple(tokens[-length:]))
            if start is not None:
                chain = Tree.chain([tokens[-1], *tokens[start : start + count]])
                self.has_guessed = True
                # The longer the run that was found, the likelier what followed it.
                return replace(chain, slots=[(length, node) for node in range(len(chain))])
        return Tree.root(tokens[-1])

    def observe(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        if self.has_guessed and len(path) == 1 and tree.num_scored > 1:
            self.resume_at = len(tokens) + self.config.patience

    def _index(self, tokens: Sequence[int]) -> None:
        """Remember where every run of 2 to `match` tokens was followed by another token."""
        for end in range(max(self.indexed, 2), len(tokens)):
            for length in range(2, min(self.config.match, end) + 1):
                self.after[tuple(tokens[end - length : end])] = end
        self.indexed = max(self.indexed, len(tokens))
