"""Guessing with a second, cheaper model: what every method that does so shares.

A tree grows level by level: the draft model scores the nodes of the last level, and the method chooses, or
draws, the nodes below them. Shapes: n nodes of a level, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from plait.decode.sampler import Sampler
from plait.decode.speculate.base import Speculator, SpeculatorConfig
from plait.decode.speculate.tree import Context, Tree
from plait.errors import ConfigError
from plait.memory import Causal, Mask, MemoryPlan, Rows
from plait.memory import Tree as TreeMask
from plait.nn import Transformer, lower

__all__ = ["DraftModelConfig", "DraftModelSpeculator", "Level", "Reader", "level_of"]

# Rows of one forward pass while the draft model reads a prompt.
_ROWS_AT_ONCE = 512

# The nodes below a level: the index of the parent among the level's nodes, and the token.
Children = list[tuple[int, int]]


@dataclass(frozen=True)
class Level:
    """What a method may know when it chooses the nodes below a level.

    Args:
        depth: 0 for the root.
        log_laws: log-probabilities of what follows each node under the draft, (n, V) float64; warped as
            the request asks for, but in greedy decoding without temperature and truncation.
        gumbel: standard Gumbel numbers for each node, (n, V); None in greedy decoding, where nothing is
            drawn.
        room: most nodes that may be added.
    """

    depth: int
    log_laws: npt.NDArray[np.float64]
    gumbel: npt.NDArray[np.float64] | None
    room: int

    @property
    def perturbed(self) -> npt.NDArray[np.float64]:
        """Log-laws plus Gumbel numbers, whose largest entries are draws; in greedy decoding the log-laws."""
        return self.log_laws if self.gumbel is None else self.log_laws + self.gumbel


@dataclass(frozen=True, kw_only=True)
class DraftModelConfig(SpeculatorConfig):
    """Base of the methods that guess with a draft model.

    The draft model is the one that was given when the model was loaded, or else the first `layers` blocks
    of the model itself. Either way the draft has a memory of its own, of plain fp32 rows.

    Args:
        layers: blocks of a draft that is made of the model's own first blocks and its head.
    """

    layers: Annotated[int, Field(ge=1)] | None = None

    @property
    def wants_draft_model(self) -> bool:
        return self.layers is None

    def for_model(self, target: Transformer, draft: Transformer | None = None) -> Callable[[], Speculator]:
        if (draft is None) == (self.layers is None):
            raise ConfigError(
                f"{self.name} guesses with a draft model, or with the first layers of the model. "
                f"Give either draft_model or {self.name}:layers=N."
            )
        if self.layers is not None:
            count = len(target.config.blocks)
            if self.layers > count:
                raise ConfigError(
                    f"{type(self).__name__}.layers must be at most the {count} of the model. Got {self.layers}."
                )
            draft = target.with_blocks(range(self.layers))
            if target.program is not None:
                lower(draft)
        assert draft is not None
        return lambda: self.guess_with(Reader(draft, target.config.vocab_size))

    def guess_with(self, reader: Reader) -> Speculator:
        """A new speculator for one sequence that guesses with this draft."""
        raise NotImplementedError


class Reader:
    """A draft model and what it remembers of one sequence.

    Args:
        model: the draft.
        vocab_size: V of the model that answers. Logits of further tokens are cut off; tokens that the
            draft does not know are never proposed.
    """

    def __init__(self, model: Transformer, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.past = model.new_past(MemoryPlan())
        # The tree that is being grown: position of its root, nodes that were read, and how.
        self.root = 0
        self.num_read = 0
        self.as_tree = False

    @torch.inference_mode()
    def start(self, tokens: Sequence[int]) -> Tensor:
        """Read what is new of a sequence; logits of what follows its last token, (1, V)."""
        self.root, self.num_read, self.as_tree = len(tokens) - 1, 1, False
        self.go_back(self.root)
        while True:
            piece = tokens[len(self.past) : len(self.past) + _ROWS_AT_ONCE]
            hidden = self._forward(piece, Causal())
            self.past.commit()
            if len(self.past) == len(tokens):
                return self._logits(hidden[-1:])

    @torch.inference_mode()
    def score(self, tree: Tree, nodes: Sequence[int]) -> Tensor:
        """Logits of what follows some nodes of the tree that grows from the last token, (n, V).

        A chain is read on where it ends. A tree that branches is read anew from its root for each level,
        since a memory takes a tree only whole.
        """
        first = self.num_read
        self.as_tree = not tree.is_chain
        if self.as_tree:
            first = 0
            self.go_back(self.root)
        hidden = self._forward(tree.tokens[first:], TreeMask(tree.parents) if self.as_tree else Causal())
        self.num_read = len(tree)
        return self._logits(hidden[[node - first for node in nodes]])

    def keep(self, path: Sequence[int]) -> None:
        """Remember the accepted nodes, as far as they were read."""
        read = [node for node in path if node < self.num_read]
        if self.as_tree:
            self.past.commit(read)
        elif self.num_read:
            self.go_back(self.root + len(read))
            self.past.commit()
        self.num_read, self.as_tree = 0, False

    def go_back(self, length: int) -> None:
        """Forget what was read beyond so many tokens."""
        if len(self.past) > length:
            self.past.truncate(length)

    def _forward(self, tokens: Sequence[int], mask: Mask) -> Tensor:
        rows = Rows([(len(tokens), len(self.past), mask)])
        hidden: Tensor = self.model(torch.tensor(tokens, dtype=torch.int64), rows, [self.past])
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden)[:, : self.vocab_size]
        return pad(logits, (0, self.vocab_size - logits.shape[1]), value=-torch.inf)


class DraftModelSpeculator(Speculator):
    """Grows a tree level by level.

    Args:
        reader: the draft.
        depth: most levels below the root.
    """

    def __init__(self, reader: Reader, depth: int) -> None:
        self.reader = reader
        self.depth = depth

    def grow(self, level: Level) -> Children:
        """The nodes of the next level; siblings in the order in which they were drawn."""
        raise NotImplementedError

    def propose(self, context: Context) -> Tree:
        tree = Tree.root(context.tokens[-1])
        drawn: set[int] = set()
        laws: dict[int, Tensor] = {}
        paths: list[list[int]] = [[]]
        nodes = [0]
        for depth in range(min(self.depth, context.depth)):
            room = context.budget - len(tree) + 1
            if room < 1 or not nodes:
                break
            logits = self.reader.score(tree, nodes) if depth else self.reader.start(context.tokens)
            level, warped = level_of(context, depth, nodes, [paths[node] for node in nodes], logits, room)
            below = []
            for index, token in self.grow(level):
                parent = nodes[index]
                below.append(len(tree))
                tree.tokens.append(token)
                tree.parents.append(parent)
                paths.append([*paths[parent], token])
                laws[parent] = warped[index]
            if level.gumbel is not None:
                drawn.update(below)
            nodes = below
        return Tree(tree.tokens, tree.parents, frozenset(drawn), laws if drawn else {})

    def observe(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        self.reader.keep(path)

    def may_trim(self, sampler: Sampler) -> bool:
        # Other draws would be judged with the same numbers: the same law, but not the same text for a seed.
        return sampler.sampling.is_greedy or sampler.sampling.seed is None

    def nbytes(self) -> int:
        return self.reader.past.nbytes()


def level_of(
    context: Context, depth: int, nodes: Sequence[int], paths: Sequence[list[int]], logits: Tensor, room: int
) -> tuple[Level, list[Tensor]]:
    """A level, and the law behind each of its nodes; each node's path counts as its history."""
    sampler, history, length = context.sampler, context.history, len(context.history)
    is_greedy = sampler.sampling.is_greedy
    laws = []
    for path, row in zip(paths, logits, strict=True):
        try:
            history.extend(path)
            laws.append(sampler.warped(row, history) if is_greedy else sampler.law(row, history))
        finally:
            history.truncate(length)
    stacked = torch.stack(laws).double()
    if is_greedy:
        return Level(depth, stacked.log_softmax(dim=-1).numpy(), None, room), laws
    # Every tree has a root of its own position, so no number is used twice.
    gumbel = np.stack([sampler.streams.gumbel(sampler.vocab_size, length, node) for node in nodes])
    return Level(depth, stacked.log().numpy(), gumbel, room), laws
