"""Lexical unit decoding: placeholders behind the text, answered together, of which the certain ones are kept.

Source: Sun et al. 2024, "Decoding at the Speed of Thought", arXiv:2405.15208. The verified mode, and the
exact rule against repetition, are ours. The model must have been tuned for it: `plait train lud`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from plait.decode.sampler import Sampler
from plait.decode.speculate.base import Speculator, SpeculatorConfig
from plait.decode.speculate.tree import Context, Tree
from plait.errors import IncompatibleError
from plait.nn import Transformer

__all__ = ["LUD"]


@dataclass(frozen=True, kw_only=True)
class LUD(SpeculatorConfig, name="lud"):
    """Guess the next few tokens from placeholders, in the same pass as the next token.

    Needs a model that was tuned for it, and no other. Costs the rows that it adds to the forward pass:
    `pads` of them; when verified, `pads` behind every guess as well. The mode `verified` never changes a
    greedy answer. The mode `lossy`, which is the paper's, takes certain guesses as they are: the answer is
    then not the model's own, and penalties do not reach the guesses.

    Args:
        pads: placeholders; at most so many tokens are guessed.
        beta: a guess, and all behind it, is given up if its probability is below this. Above 1 is plain
            decoding.
        mode: `verified` checks guesses in the next pass; `lossy` does not.
    """

    pads: Annotated[int, Field(ge=1, le=16)] = 4
    beta: Annotated[float, Field(gt=0)] = 0.9
    mode: Literal["verified", "lossy"] = "verified"

    def for_model(self, target: Transformer, draft: Transformer | None = None) -> Callable[[], Speculator]:
        if draft is not None:
            raise IncompatibleError(f"{self.name} has no use for a draft model. Leave the draft model out.")
        placeholder = target.config.placeholder
        if placeholder is None:
            raise IncompatibleError(
                "lud needs a model that was tuned to answer placeholders, and this one has none. "
                "Tune it with: plait train lud --model MODEL --out FOLDER"
            )
        return lambda: _UnitGuesser(self, placeholder)


class _UnitGuesser(Speculator):
    """The guesses of one sequence: what the probes behind its last token said."""

    def __init__(self, config: LUD, placeholder: int) -> None:
        self.config = config
        self.placeholder = placeholder
        self.guesses: list[int] = []

    def propose(self, context: Context) -> Tree:
        chain = self.guesses[: max(context.budget, 0)]
        tokens, parents = [context.tokens[-1], *chain], [node - 1 for node in range(len(chain) + 1)]
        last = len(chain)
        is_lossy = self.config.mode == "lossy"
        probes: set[int] = set()
        # The deepest first, where the walk ends if all goes well, as long as there is room.
        for host in [last] if is_lossy else range(last, -1, -1):
            count = min(self.config.pads, context.budget - len(tokens) + 1)
            own: list[int] = []
            for _ in range(count):
                parents.append(own[-1] if own else host)
                own.append(len(tokens))
                tokens.append(self.placeholder)
            probes.update(own)
        trusted = frozenset(range(1, last + 1)) if is_lossy else frozenset()
        return Tree(tokens, parents, probes=frozenset(probes), trusted=trusted)

    def may_trim(self, sampler: Sampler) -> bool:
        return self.config.mode == "verified"

    def observe(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        self.guesses = []
        before = tokens[-1]
        # The rows of the probes below the node where the walk ended.
        own: list[int] = []
        host = path[-1]
        for row, node in enumerate(tree.scored):
            if node in tree.probes and tree.parents[node] == host:
                own.append(row)
                host = node
        if not own:
            return
        best = logits[own].softmax(dim=-1).max(dim=-1)
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if probability < self.config.beta or (token == before and not _has_pair(tokens, token)):
                return
            self.guesses.append(token)
            before = token


def _has_pair(tokens: Sequence[int], token: int) -> bool:
    """Whether a token stands twice in a row anywhere; else a guess that repeats it is a slip."""
    return any(first == second == token for first, second in pairwise(tokens))
