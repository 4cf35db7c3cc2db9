"""Draft trees: continuations that a speculator proposes and the model checks in one forward pass."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from plait.decode.history import History
from plait.decode.sampler import Sampler
from plait.errors import ConfigError

__all__ = ["Context", "Tree"]


class Context(NamedTuple):
    """What a speculator may look at.

    Attributes:
        tokens: every token so far, prompt and answer; the last is the root of the tree.
        budget: most nodes that may be proposed besides the root.
        positions: the model's context in tokens.
        sampler: how the sequence's tokens are chosen.
        history: of the sequence, root included; to be left as it is.
        depth, width: most levels, and about the most nodes, that are worth drafting.
    """

    tokens: Sequence[int]
    budget: int
    positions: int
    sampler: Sampler
    history: History
    depth: int = 10**6
    width: int = 10**6


@dataclass(frozen=True)
class Tree:
    """Candidate continuations of the last token, which is the root, node 0.

    A node that was drawn at random may be declared as such; then it is judged by rejection sampling, and
    what that needs is declared with it. The answer has the model's law only if the declaration is true:

    - given the path to its parent and the siblings drawn before it, a drawn node has the declared law;
    - siblings stand in the order in which they were drawn;
    - nothing that was drawn is left out because of what it is. How many are drawn may depend on anything
      known before, or on the perturbed scores of stochastic beam search, but not on the tokens drawn;
    - the draws are independent of the numbers of `context.sampler.streams` of purpose `verify`.

    A node that is not declared as drawn may be chosen in any way at all.

    A *probe* is read with the others and proposes nothing: it asks the model what it would say there, such
    as behind a placeholder. It is never chosen and never remembered. A *trusted* node is taken as it is,
    without asking the model, so that the answer no longer is the model's own.

    An *unscored* node is judged as the others are, by what the model says to its parent, but is not itself in the
    forward pass: a walk that reaches it ends there, and it becomes the next root. Which nodes are scored must not
    depend on the tokens of drawn ones.

    Args:
        tokens: token of each node; `tokens[0]` is the last token of the sequence.
        parents: parent of each node; `parents[0] == -1` and `parents[i] < i`.
        drawn: the nodes that were drawn.
        laws: for each parent of drawn nodes, the law of its first draw, (V,).
        replacement: whether siblings were drawn independently; else each without those before it.
        probes: nodes that are read only; nothing but probes stands below one.
        trusted: nodes that are taken unchecked; at most one below each node.
        unscored: nodes outside the forward pass; so is all that stands below one.
        slots: for each node a name under which it is remembered how often such nodes are right, root
            included; left out, its place in the tree.
    """

    tokens: list[int]
    parents: list[int]
    drawn: frozenset[int] = frozenset()
    laws: Mapping[int, Tensor] = field(default_factory=dict)
    replacement: bool = False
    probes: frozenset[int] = frozenset()
    trusted: frozenset[int] = frozenset()
    unscored: frozenset[int] = frozenset()
    slots: Sequence[Hashable] = ()

    @classmethod
    def root(cls, token: int) -> Tree:
        """The tree that proposes nothing."""
        return cls([token], [-1])

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Tree:
        """One continuation: the root, then each token below the one before it."""
        return cls(list(tokens), [node - 1 for node in range(len(tokens))])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def scored(self) -> list[int]:
        """The nodes in the forward pass, in the order of its rows."""
        return [node for node in range(len(self)) if node not in self.unscored]

    @property
    def num_scored(self) -> int:
        """How many nodes are in the forward pass."""
        return len(self) - len(self.unscored)

    @cached_property
    def places(self) -> list[tuple[int, ...]]:
        """Where each node stands: for every level down to it, how many siblings come before."""
        counts = [0] * len(self)
        places: list[tuple[int, ...]] = [()]
        for parent in self.parents[1:]:
            places.append((*places[parent], counts[parent]))
            counts[parent] += 1
        return places

    def slot(self, node: int) -> Hashable:
        """The name under which it is remembered how often nodes like this one are right."""
        return self.slots[node] if self.slots else self.places[node]

    def only_scored(self) -> Tree:
        """Tokens and parents of the scored nodes alone, numbered by their rows."""
        if not self.unscored:
            return self
        scored = self.scored
        row_of = {node: row for row, node in enumerate(scored)}
        return Tree(
            [self.tokens[node] for node in scored],
            [row_of.get(self.parents[node], -1) for node in scored],
        )

    @property
    def is_chain(self) -> bool:
        """Whether no node has more than one child."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def children(self, node: int) -> list[int]:
        """The nodes that propose a token below a node, in order."""
        return [
            child for child, parent in enumerate(self.parents) if parent == node and child not in self.probes
        ]

    def depths(self) -> list[int]:
        """How many nodes each node stands below the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if depths else 0)
        return depths

    def check(self, context: Context, vocab_size: int) -> None:
        """Raise `ConfigError` for a tree that cannot be scored."""
        if not self.tokens or self.tokens[0] != context.tokens[-1] or self.parents[0] != -1:
            raise ConfigError("A draft tree must start with the last token of the sequence as its root.")
        if self.num_scored - 1 > max(context.budget, 0):
            raise ConfigError(
                f"A draft tree may have {context.budget} nodes besides its root. Got {self.num_scored - 1}."
            )
        if self.slots and len(self.slots) != len(self):
            raise ConfigError(
                f"A draft tree of {len(self)} nodes needs as many slots. Got {len(self.slots)}."
            )
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"Node {node} proposes token {token}. Token ids must be in [0, {vocab_size})."
                )
            if node and not 0 <= parent < node:
                raise ConfigError(f"Node {node} has parent {parent}. A parent comes before its child.")
            if (node in self.unscored and not node) or (parent in self.unscored) > (node in self.unscored):
                raise ConfigError(
                    f"Node {node} is scored or the root, but stands at or below an unscored one."
                )
            if parent in self.probes and node not in self.probes:
                raise ConfigError(f"Node {node} proposes a token below probe {parent}, which proposes none.")
            if node in self.drawn and (parent not in self.laws or self.laws[parent].shape != (vocab_size,)):
                raise ConfigError(
                    f"Node {node} was drawn, so its parent {parent} needs a draft law of shape ({vocab_size},)."
                )
