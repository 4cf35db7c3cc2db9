"""PAC prediction sets of trees: which parts of a predicted program to keep, and how sure that is.

Paper: Khakhar, Mell, Bastani 2023, "PAC Prediction Sets for Large Language Models of Code", arXiv:2302.08703
(ICML 2023), sections 3 and 4. The paper solves an integer program for each threshold; here the same optimum
comes from a knapsack over the tree, exactly.

A prediction is a tree; each node owns tokens of the generated text, and costs their negative log-probability
in nats. A threshold tau is a budget of -log tau nats for what is kept. What is removed under a kept node is
one hole, which stands for any tree. Letters: n nodes, m most holes, h holes, r removed nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from plait.errors import ConfigError

__all__ = [
    "GRID",
    "MAX_NATS",
    "MAX_NODES",
    "Node",
    "Tree",
    "calibrated_index",
    "errors_allowed",
    "kept_sets",
    "matches",
    "num_needed",
]

GRID: tuple[float, ...] = tuple(float(tau) for tau in np.linspace(1e-5, 1 - 1e-5, 100))
"""Thresholds, fixed before any data is seen; budgets fall from 11.5 nats to 1e-5."""

MAX_NATS = 10.0
"""Most that one node costs, so that one impossible token does not decide alone."""

MAX_NODES = 1000

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Node:
    """A part of a program.

    Args:
        label: what the node itself says: its kind, names, operators and constants.
        children: its parts, as `(field, is_list, node)` in order. Trees are compared field by field.
    """

    label: str
    children: tuple[tuple[str, bool, Node], ...] = ()


@dataclass(frozen=True)
class Tree:
    """A predicted program as numbers, its nodes in preorder.

    Args:
        root: the program.
        nats: cost of each node; None for one that owns no token: it goes with its parent.
    """

    root: Node
    nats: tuple[float | None, ...]
    parents: tuple[int, ...] = field(init=False)
    nodes: tuple[Node, ...] = field(init=False)

    def __post_init__(self) -> None:
        nodes: list[Node] = []
        parents: list[int] = []
        stack = [(self.root, -1)]
        while stack:
            node, parent = stack.pop()
            stack += [(child, len(nodes)) for _, _, child in reversed(node.children)]
            nodes.append(node)
            parents.append(parent)
        if len(nodes) != len(self.nats):
            raise ConfigError(f"Each node needs one cost. Got {len(self.nats)} for {len(nodes)} nodes.")
        if len(nodes) > MAX_NODES:
            raise ConfigError(f"A program may have {MAX_NODES} nodes. Got {len(nodes)}; split it.")
        for cost in self.nats:
            if cost is not None and not cost >= 0:
                raise ConfigError(f"A node's cost must be 0 nats or more. Got {cost}.")
        object.__setattr__(self, "nodes", tuple(nodes))
        object.__setattr__(self, "parents", tuple(parents))

    def __len__(self) -> int:
        return len(self.nats)


def errors_allowed(n: int, epsilon: float, delta: float) -> int | None:
    """Most calibration errors k with P(Binomial(n, epsilon) <= k) <= delta; None if even none are too many.

    Paper: section 4, after Wilks. With `num_needed` examples or more there is such a k.
    """
    _check_promise(epsilon, delta)
    total, allowed = 0.0, None
    for k in range(n + 1):
        log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(log + k * math.log(epsilon) + (n - k) * math.log1p(-epsilon))
        if total > delta:
            break
        allowed = k
    return allowed


def num_needed(epsilon: float, delta: float) -> int:
    """Fewest calibration examples with which anything can be promised."""
    _check_promise(epsilon, delta)
    n = math.ceil(math.log(delta) / math.log1p(-epsilon))
    return n if (1 - epsilon) ** n <= delta else n + 1


def _check_promise(epsilon: float, delta: float) -> None:
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} must be between 0 and 1, both excluded. Got {value}.")


def calibrated_index(covered: Sequence[Sequence[bool]], epsilon: float, delta: float) -> int | None:
    """The threshold to use: the smallest whose calibration errors are few enough.

    Args:
        covered: of each calibration example, whether its set holds the truth at each threshold, ascending;
            once it does it must go on to, since sets only grow.

    Returns:
        An index of the thresholds, or None if the errors are too many at all of them: then only the hole
        that stands for everything keeps the promise.

    Raises:
        ConfigError: too few examples (the message says how many are needed), or sets that do not grow.
    """
    allowed = errors_allowed(len(covered), epsilon, delta)
    if allowed is None:
        raise ConfigError(
            f"epsilon {epsilon} with delta {delta} needs at least {num_needed(epsilon, delta)} calibration "
            f"examples. Got {len(covered)}."
        )
    table = np.asarray(covered, dtype=bool)
    if table.ndim != 2 or (table[:, :-1] & ~table[:, 1:]).any():
        raise ConfigError(
            "The sets of an example must be nested: what a threshold covers, larger ones cover."
        )
    few = np.flatnonzero((~table).sum(axis=0) <= allowed)
    return int(few[0]) if len(few) else None


class _Merge(NamedTuple):
    """A table over the first children of a node, with one more child, for walking back."""

    child: int
    before: Floats


def kept_sets(tree: Tree, taus: Sequence[float] = GRID, *, holes: int = 4) -> Bools:
    """The nodes that are kept at each threshold: as many as the budget and the holes allow, nested.

    From the largest threshold (the smallest budget) down, the most nodes that can be kept at a cost of at most
    -log tau, in at most `holes` holes, with all nodes that were kept before. Of equal choices: fewer holes, then
    the least cost, then the earliest removed in the source. O(n^2 m^2) for each set that differs from the last.

    Args:
        tree: the prediction.
        taus: thresholds in (0, 1), ascending.
        holes: most holes, at least 1.

    Returns:
        (thresholds, nodes) bool.
    """
    if holes < 1:
        raise ConfigError(f"holes must be at least 1. Got {holes}.")
    if not taus or any(not 0 < tau < 1 for tau in taus) or list(taus) != sorted(taus):
        raise ConfigError("taus must be thresholds between 0 and 1 in ascending order.")
    problem = _Problem(tree, holes)
    forced = np.zeros(len(problem.nats), dtype=bool)
    kept = np.zeros((len(taus), len(tree)), dtype=bool)
    problem.solve(forced)
    for index in range(len(taus) - 1, -1, -1):
        budget = -math.log(taus[index])
        found = problem.best(budget)
        if found is not None and not (found == forced).all():
            forced = found
            problem.solve(forced)
        kept[index] = forced[problem.group]
    return kept


class _Problem:
    """The knapsack over one tree; nodes without tokens are part of their parents."""

    def __init__(self, tree: Tree, holes: int) -> None:
        self.holes = holes
        self.group = np.zeros(len(tree), dtype=np.int64)  # of each node, its variable
        self.nats: list[float] = []
        self.weight: list[int] = []  # nodes of each variable
        self.children: list[list[int]] = []
        for node, (parent, cost) in enumerate(zip(tree.parents, tree.nats, strict=True)):
            if cost is None and parent >= 0:
                self.group[node] = self.group[parent]
                self.weight[self.group[node]] += 1
                continue
            self.group[node] = len(self.nats)
            if parent >= 0:
                self.children[self.group[parent]].append(len(self.nats))
            self.nats.append(min(cost or 0.0, MAX_NATS))
            self.weight.append(1)
            self.children.append([])
        self.size = list(self.weight)
        for node in range(len(self.nats) - 1, -1, -1):
            self.size[node] += sum(self.size[child] for child in self.children[node])

    def solve(self, forced: Bools) -> None:
        """Fill the tables: least cost of a subtree whose root is kept, by holes and removed nodes."""
        self.forced = forced
        self.tables: list[Floats] = [np.empty(0)] * len(self.nats)
        self.merges: list[list[_Merge]] = [[] for _ in self.nats]
        for node in range(len(self.nats) - 1, -1, -1):
            table = np.full((self.holes + 1, 1), np.inf)
            table[0, 0] = self.nats[node]
            for child in self.children[node]:
                self.merges[node].append(_Merge(child, table))
                table = self._merged(table, self._options(child))
            self.tables[node] = table

    def _options(self, node: int) -> Floats:
        """The table of a subtree that may also be one hole."""
        kept = self.tables[node]
        options = np.full((self.holes + 1, self.size[node] + 1), np.inf)
        options[:, : kept.shape[1]] = kept
        # Whoever forces a node forces its ancestors too, so the root of a subtree tells of all of it.
        if not self.forced[node]:
            options[1, self.size[node]] = 0.0
        return options

    def _merged(self, left: Floats, right: Floats) -> Floats:
        """Least sums: out[h, r] = min over h1, r1 of left[h1, r1] + right[h - h1, r - r1]."""
        if right.shape[1] > left.shape[1]:
            left, right = right, left
        out = np.full((self.holes + 1, left.shape[1] + right.shape[1] - 1), np.inf)
        for h, r in np.argwhere(np.isfinite(right)):
            part = out[h:, r : r + left.shape[1]]
            np.minimum(part, left[: self.holes + 1 - h] + right[h, r], out=part)
        return out

    def best(self, budget: float) -> Bools | None:
        """The variables kept within a budget; None if the forced ones alone exceed it."""
        options = self._options(0)
        fits = np.argwhere(budget + 1e-12 >= options.T)  # by removed nodes first, then by holes
        if not len(fits):
            return None
        removed, holes = (int(value) for value in fits[0])
        kept = np.zeros(len(self.nats), dtype=bool)
        stack = [(0, holes, removed)]
        while stack:
            node, holes, removed = stack.pop()
            if removed == self.size[node] and not self.forced[node] and holes == 1:
                continue
            kept[node] = True
            table = self.tables[node]
            for child, before in reversed(self.merges[node]):
                options = self._options(child)
                target = table[holes, removed]
                h, r = self._split(before, options, holes, removed, target)
                stack.append((child, h, r))
                table, holes, removed = before, holes - h, removed - r
        return kept

    def _split(
        self, before: Floats, options: Floats, holes: int, removed: int, target: float
    ) -> tuple[int, int]:
        """How many holes and removed nodes the last child has in the best sum."""
        for h in range(holes + 1):
            low, high = max(0, removed - before.shape[1] + 1), min(removed, options.shape[1] - 1)
            for r in range(low, high + 1):
                total = before[holes - h, removed - r] + options[h, r]
                if math.isfinite(total) and abs(total - target) <= 1e-9:
                    return h, r
        raise AssertionError("the table holds a sum that its parts do not make")


def matches(tree: Tree, kept: Sequence[bool], other: Node, *, variadic: bool = False) -> bool:
    """Whether another program is the predicted one with something in the holes.

    Args:
        kept: of each node of the tree, whether it is kept.
        variadic: a hole in a list stands for any number of elements, none included; otherwise for one.
    """
    children: list[list[int]] = [[] for _ in range(len(tree))]
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            children[parent].append(node)

    def pairs(node: int, theirs: Node) -> list[tuple[int, Node]] | None:
        """What has to match below two equal nodes; None if their shapes differ."""
        ours = tree.nodes[node]
        if ours.label != theirs.label:
            return None
        if [child[:2] for child in ours.children] != [child[:2] for child in theirs.children]:
            return None
        return list(zip(children[node], (child for _, _, child in theirs.children), strict=True))

    def fits(node: int, theirs: Node) -> bool:
        stack = [(node, theirs)]
        while stack:
            node, theirs = stack.pop()
            if not kept[node]:
                continue
            if variadic:
                if not fits_fields(node, theirs):
                    return False
                continue
            below = pairs(node, theirs)
            if below is None:
                return False
            stack += below
        return True

    def fits_fields(node: int, theirs: Node) -> bool:
        ours = tree.nodes[node]
        if ours.label != theirs.label:
            return False
        names = {child[0] for child in (*ours.children, *theirs.children)}
        for name in names:
            mine = [
                (index, child[1])
                for index, child in zip(children[node], ours.children, strict=True)
                if child[0] == name
            ]
            wanted = [child for field_name, _, child in theirs.children if field_name == name]
            if not fits_list([index for index, _ in mine], all(is_list for _, is_list in mine), wanted):
                return False
        return True

    def fits_list(mine: list[int], is_list: bool, wanted: list[Node]) -> bool:
        # reach[j]: the elements so far stand for the first j of the other list.
        reach = [True, *([False] * len(wanted))]
        for node in mine:
            following = [False] * (len(wanted) + 1)
            for j in range(len(wanted) + 1):
                if not kept[node] and is_list:
                    following[j] = any(reach[: j + 1])
                elif j and reach[j - 1]:
                    following[j] = fits(node, wanted[j - 1])
            reach = following
        return reach[-1]

    return fits(0, other)
