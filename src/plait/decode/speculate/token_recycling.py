"""Token Recycling: guess from the runners-up of earlier forward passes.

Source: Luo et al. 2024, "Turning Trash into Treasure", arXiv:2408.08696, section 3. A table keeps, for each
token, the k likeliest tokens behind its last occurrence; a fixed tree of ranks is read off the table.
Shapes: V vocabulary, k candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from plait.decode.speculate.base import Speculator, SpeculatorConfig
from plait.decode.speculate.tree import Context, Tree
from plait.errors import ConfigError, IncompatibleError
from plait.nn import Transformer

__all__ = ["TEMPLATE", "TokenRecycling"]

# The paper's tree of 80 nodes. A node is its path of ranks: "021" is the second likeliest token behind the
# third likeliest behind the likeliest of the root.
TEMPLATE = (
    *["0", "1", "2", "3", "4", "5", "6", "7"],
    *[
        "00",
        "01",
        "02",
        "03",
        "04",
        "05",
        "06",
        "07",
        "10",
        "11",
        "12",
        "13",
        "20",
        "21",
        "22",
        "30",
        "31",
        "40",
        "50",
        "60",
        "70",
    ],
    *[
        "000",
        "001",
        "002",
        "003",
        "004",
        "005",
        "006",
        "007",
        "010",
        "011",
        "012",
        "020",
        "021",
        "030",
        "040",
        "050",
        "060",
        "070",
    ],
    *["100", "101", "110", "200", "300", "400", "500"],
    *[
        "0000",
        "0001",
        "0002",
        "0003",
        "0004",
        "0010",
        "0011",
        "0020",
        "0030",
        "0040",
        "0100",
        "0200",
        "1000",
        "2000",
        "3000",
    ],
    *["00000", "00001", "00002", "00010", "00020", "00100", "01000", "10000"],
    *["000000", "000001", "000100"],
)


@dataclass(frozen=True, kw_only=True)
class TokenRecycling(SpeculatorConfig, name="token-recycling"):
    """Propose what the model thought likely the last time it met each token.

    Needs no second model and no training, and learns from every answer: the table is shared by all
    requests of a loaded model. It holds `4 * k` bytes for each token of the vocabulary. Costs the rows
    it adds to the forward pass; of the paper's 80 nodes the budget takes those that are worth it.

    Args:
        k: candidates kept for each token.
        nodes: most tokens proposed at once: the first of the paper's tree, likeliest ranks first.
    """

    k: Annotated[int, Field(ge=1, le=8)] = 8
    nodes: Annotated[int, Field(ge=1, le=len(TEMPLATE))] = 80

    def for_model(self, target: Transformer, draft: Transformer | None = None) -> Callable[[], Speculator]:
        if draft is not None:
            raise IncompatibleError(f"{self.name} has no use for a draft model. Leave the draft model out.")
        table = Table(target.config.vocab_size, self.k, self.nodes)
        return lambda: _Recycler(table)


class Table:
    """The likeliest successors of each token.

    Args:
        vocab_size: V.
        k: candidates for each token.
        nodes: of the template that are used.

    Raises:
        ConfigError: there are fewer tokens than candidates.
    """

    def __init__(self, vocab_size: int, k: int, nodes: int = len(TEMPLATE)) -> None:
        if k > vocab_size:
            raise ConfigError(f"TokenRecycling.k must be at most the vocabulary of {vocab_size}. Got {k}.")
        # -1 where nothing is known yet, so that no row is spent on it.
        self.successors = np.full((vocab_size, k), -1, dtype=np.int32)
        paths = [tuple(int(rank) for rank in path) for path in TEMPLATE]
        # A path is as likely as its ranks say; none is likelier than its beginning.
        paths.sort(key=lambda path: -np.prod([0.5 / (1 + rank) for rank in path]))
        self.paths = [path for path in paths if max(path) < k][:nodes]
        slot_of = {path: slot for slot, path in enumerate(self.paths)}
        self.parents = [slot_of.get(path[:-1], -1) for path in self.paths]

    def read(self, root: int, most: int) -> Tree:
        """The template's tree below a token, without what is not known and without siblings that are equal.

        Args:
            root: the token.
            most: nodes below it.
        """
        tokens, parents = [root], [-1]
        slots: list[tuple[int, ...]] = [()]
        node_of = {-1: 0}
        siblings: set[tuple[int, int]] = set()
        rows: list[list[int]] = [self.successors[root].tolist()]
        for slot, (path, above) in enumerate(zip(self.paths, self.parents, strict=True)):
            if len(tokens) > most:
                break
            parent = node_of.get(above)
            if parent is None:
                continue
            if not rows[parent]:
                rows[parent] = self.successors[tokens[parent]].tolist()
            token = rows[parent][path[-1]]
            if token < 0 or (parent, token) in siblings:
                continue
            node_of[slot] = len(tokens)
            siblings.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            slots.append(path)
            rows.append([])
        return Tree(tokens, parents, slots=slots)

    def follow(self, tokens: Sequence[int]) -> None:
        """Put what followed each token of a text first among its successors."""
        for token, following in pairwise(tokens):
            row = self.successors[token]
            others = row[row != following][: len(row) - 1]
            self.successors[token, 0], self.successors[token, 1 : 1 + len(others)] = following, others

    def learn(self, tokens: Sequence[int], logits: Tensor) -> None:
        """Replace the successors of tokens by their likeliest; the last row of a token counts.

        Args:
            tokens: n of them.
            logits: of what follows each, (n, V).
        """
        best = logits.topk(self.successors.shape[1], dim=-1).indices.cpu().numpy()
        last = {token: row for row, token in enumerate(tokens)}
        self.successors[list(last)] = best[list(last.values())]

    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.successors.nbytes


class _Recycler(Speculator):
    def __init__(self, table: Table) -> None:
        self.table = table
        self.has_read_prompt = False

    def propose(self, context: Context) -> Tree:
        if not self.has_read_prompt:
            self.table.follow(context.tokens)
            self.has_read_prompt = True
        return self.table.read(context.tokens[-1], min(context.budget, context.width))

    def observe(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        # Accepted nodes count most, then shallow ones, which know more of the text for certain.
        accepted = set(path)
        depths = tree.depths()
        scored = tree.scored
        rows = sorted(range(len(scored)), key=lambda row: (scored[row] in accepted, -depths[scored[row]]))
        self.table.learn([tree.tokens[scored[row]] for row in rows], logits[rows])

    def pass_over(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: Tensor) -> None:
        # To look for the runners-up takes a hundredth of a pass of a small model.
        self.table.follow(tokens[-2:])

    def nbytes(self) -> int:
        return self.table.nbytes()
