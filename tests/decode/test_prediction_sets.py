from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from plait.decode.prediction_sets import (
    GRID,
    Node,
    Tree,
    calibrated_index,
    errors_allowed,
    kept_sets,
    matches,
    num_needed,
)
from plait.errors import ConfigError


def random_tree(rng: random.Random, size: int, *, silent: float = 0.2) -> Tree:
    """A tree of `size` nodes, some of which own no token."""
    children: list[list[int]] = [[] for _ in range(size)]
    for node in range(1, size):
        children[rng.randrange(node)].append(node)

    def build(node: int) -> Node:
        return Node(f"n{node}", tuple(("items", True, build(child)) for child in children[node]))

    nats = [
        None if rng.random() < silent else rng.choice([0.0, rng.expovariate(2.0), 12.0]) for _ in range(size)
    ]
    return Tree(build(0), tuple(nats))


def most_kept(tree: Tree, budget: float, holes: int, forced: np.ndarray) -> int:
    """The same optimum by an integer program, node by node and edge by edge."""
    n = len(tree)
    edges = [(parent, node) for node, parent in enumerate(tree.parents) if parent >= 0]
    # Variables: a kept flag for each node, a hole flag for each edge, and one for the root.
    size = n + len(edges) + 1
    rows, low, high = [], [], []

    def add(terms: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(size)
        for index, value in terms.items():
            row[index] = value
        rows.append(row)
        low.append(least)
        high.append(most)

    for place, (parent, node) in enumerate(edges):
        silent = tree.nats[node] is None
        add({parent: 1, node: -1}, 0, 0 if silent else np.inf)
        add({parent: 1, node: -1, n + place: -1}, -np.inf, 0)
    add({0: 1, size - 1: 1}, 1, np.inf)
    add({n + place: 1.0 for place in range(len(edges) + 1)}, 0, holes)
    add({node: min(cost or 0.0, 10.0) for node, cost in enumerate(tree.nats)}, 0, budget)
    bounds = optimize.Bounds(np.concatenate([forced.astype(float), np.zeros(size - n)]), np.ones(size))
    found = optimize.milp(
        np.concatenate([-np.ones(n), np.zeros(size - n)]),
        constraints=optimize.LinearConstraint(np.array(rows), np.array(low), np.array(high)),
        integrality=np.ones(size),
        bounds=bounds,
    )
    assert found.success
    return round(-found.fun)


def num_holes(tree: Tree, kept: np.ndarray) -> int:
    return sum(
        not kept[node] and (parent < 0 or bool(kept[parent])) for node, parent in enumerate(tree.parents)
    )


@pytest.mark.parametrize("seed", range(40))
def test_as_many_nodes_are_kept_as_an_integer_program_keeps(seed: int) -> None:
    rng = random.Random(seed)
    tree = random_tree(rng, rng.randrange(1, 26))
    holes = rng.randrange(1, 5)
    taus = sorted(rng.uniform(1e-5, 1 - 1e-5) for _ in range(4))
    kept = kept_sets(tree, taus, holes=holes)
    forced = np.zeros(len(tree), dtype=bool)
    for index in range(len(taus) - 1, -1, -1):
        budget = -math.log(taus[index])
        assert kept[index].sum() == most_kept(tree, budget, holes, forced)
        forced = kept[index]


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_sets_are_within_budget_and_holes_and_nested(seed: int, size: int, holes: int) -> None:
    tree = random_tree(random.Random(seed), size)
    taus = GRID[::9]
    kept = kept_sets(tree, taus, holes=holes)
    assert (kept[:-1] >= kept[1:]).all()
    for tau, row in zip(taus, kept, strict=True):
        cost = sum(min(c or 0.0, 10.0) for c, k in zip(tree.nats, row, strict=True) if k)
        assert cost <= -math.log(tau) + 1e-9
        assert num_holes(tree, row) <= holes
        for node, parent in enumerate(tree.parents):
            assert parent < 0 or row[parent] or not row[node]
            if parent >= 0 and tree.nats[node] is None:
                assert row[node] == row[parent]


def test_a_deep_and_a_wide_tree_are_solved() -> None:
    deep = Node("x")
    for _ in range(150):
        deep = Node("x", (("value", False, deep),))
    assert kept_sets(Tree(deep, (0.1,) * 151), [0.5], holes=1).sum() == 6
    wide = Node("x", tuple(("items", True, Node("y")) for _ in range(200)))
    assert kept_sets(Tree(wide, (0.0, *([0.1] * 200))), [0.5], holes=3).sum() == 0
    assert kept_sets(Tree(wide, (0.0, *([0.001] * 197), 5.0, 5.0, 5.0)), [0.5], holes=3).sum() == 198


@pytest.mark.parametrize("seed", range(4))
def test_the_number_of_errors_allowed_is_the_binomials(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(125):
        n, epsilon, delta = rng.randrange(1, 400), rng.uniform(0.01, 0.6), rng.uniform(0.001, 0.3)
        few = np.flatnonzero(stats.binom.cdf(np.arange(n + 1), n, epsilon) <= delta)
        assert errors_allowed(n, epsilon, delta) == (few[-1] if len(few) else None)
        needed = num_needed(epsilon, delta)
        assert errors_allowed(needed, epsilon, delta) is not None
        assert needed == 1 or errors_allowed(needed - 1, epsilon, delta) is None


def test_44_examples_are_needed_for_a_tenth_at_a_hundredth() -> None:
    assert num_needed(0.1, 0.01) == 44


def test_the_smallest_threshold_with_few_errors_is_taken() -> None:
    # 30 examples; the last 3 are covered from the third threshold on.
    covered = [[True] * 4] * 27 + [[False, False, True, True]] * 3
    assert errors_allowed(30, 0.1, 0.05) == 0
    assert calibrated_index(covered, 0.1, 0.05) == 2
    assert calibrated_index([[False] * 4] * 30, 0.1, 0.05) is None
    with pytest.raises(ConfigError, match=r"at least 29 calibration examples\. Got 28"):
        calibrated_index(covered[:28], 0.1, 0.05)
    with pytest.raises(ConfigError, match="nested"):
        calibrated_index([[True, False]] * 40, 0.1, 0.05)


OPERATORS = ("add", "neg", "x")


def programs(depth: int) -> list[Node]:
    """Every program of a grammar of three operators, up to a depth."""
    if depth == 0:
        return [Node("x")]
    below = programs(depth - 1)
    binary = [Node("add", (("left", False, a), ("right", False, b))) for a in below for b in below]
    return [Node("x"), *(Node("neg", (("value", False, a),)) for a in below), *binary]


def expansions(tree: Tree, kept: tuple[bool, ...], everything: list[Node]) -> list[Node]:
    """Every program that the holes can stand for, by trying all of them."""
    children: dict[int, list[int]] = {node: [] for node in range(len(tree))}
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            children[parent].append(node)

    def expand(node: int) -> list[Node]:
        if not kept[node]:
            return everything
        parts = [expand(child) for child in children[node]]
        shape = tree.nodes[node]
        return [
            Node(
                shape.label,
                tuple(
                    (f, is_list, part) for (f, is_list, _), part in zip(shape.children, chosen, strict=True)
                ),
            )
            for chosen in itertools.product(*parts)
        ]

    return expand(0)


def test_membership_is_that_of_the_expanded_set() -> None:
    everything = programs(2)
    rng = random.Random(0)
    for root in rng.sample(everything, 12):
        size = 1 + str(root).count("Node(") - 1
        tree = Tree(root, (1.0,) * size)
        for kept in kept_sets(tree, [0.02, 0.2, 0.5, 0.9], holes=2):
            wanted = expansions(tree, tuple(kept), everything)
            for program in everything:
                assert matches(tree, kept, program) == (program in wanted)


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_removing_more_never_loses_a_program(seed: int) -> None:
    rng = random.Random(seed)
    root, other = rng.choice(programs(2)), rng.choice(programs(2))
    tree = Tree(root, (1.0,) * str(root).count("Node("))
    kept = np.ones(len(tree), dtype=bool)
    had = matches(tree, kept, other)
    assert had == (root == other)
    for node in rng.sample(range(len(tree)), len(tree)):
        kept[[index for index in range(len(tree)) if node == index or is_below(tree, index, node)]] = False
        has = matches(tree, kept, other)
        assert has or not had
        had = has
    assert had


def is_below(tree: Tree, node: int, above: int) -> bool:
    while node > above:
        node = tree.parents[node]
    return node == above


def call(*names: str) -> Node:
    return Node("call", (("func", False, Node("f")), *(("args", True, Node(name)) for name in names)))


def test_a_hole_in_a_list_stands_for_one_element_or_for_any_number() -> None:
    tree = Tree(call("a", "b", "c"), (0.0,) * 5)
    kept = [True, True, True, False, True]
    assert matches(tree, kept, call("a", "z", "c"))
    assert not matches(tree, kept, call("a", "c"))
    for names in (("a", "c"), ("a", "z", "c"), ("a", "y", "z", "c")):
        assert matches(tree, kept, call(*names), variadic=True)
    for names in (("a", "z"), ("c",), ("b", "z", "c")):
        assert not matches(tree, kept, call(*names), variadic=True)
    assert not matches(
        tree, [True, False, True, True, True], Node("call", (("args", True, Node("a")),)), variadic=True
    )


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_promise_holds_for_a_known_law(calibrated: bool) -> None:
    """A chain of names, each right with a known chance; a wrong model is too sure of all of them."""
    rng = np.random.default_rng(0)
    epsilon, delta, length, taus = 0.2, 0.1, 4, GRID[::5]
    chances = rng.uniform(0.5, 0.999, (1200, length))
    right = rng.random((1200, length)) < chances
    said = chances if calibrated else np.sqrt(np.sqrt(chances))
    covered = []
    for row, is_right in zip(said, right, strict=True):
        root = Node("call", tuple(("args", True, Node("a")) for _ in range(length)))
        kept = kept_sets(Tree(root, (0.0, *(-np.log(row)))), taus, holes=2)
        covered.append((is_right | ~kept[:, 1:]).all(axis=1))
    table = np.array(covered)
    errors = 1 - table.mean(axis=0)
    missed = 0
    for _ in range(1000):
        index = calibrated_index(table[rng.integers(0, 1200, 200)], epsilon, delta)
        missed += index is not None and errors[index] > epsilon
    assert missed / 1000 <= 0.13
    if calibrated:
        assert missed / 1000 >= 0.005


@pytest.mark.parametrize(
    ("call_it", "said"),
    [
        (lambda tree: kept_sets(tree, holes=0), "holes must be at least 1"),
        (lambda tree: kept_sets(tree, [0.5, 0.1]), "ascending"),
        (lambda tree: kept_sets(tree, [1.0]), "between 0 and 1"),
        (lambda tree: kept_sets(tree, []), "between 0 and 1"),
        (lambda tree: errors_allowed(10, 0.0, 0.1), "epsilon must be between 0 and 1"),
        (lambda tree: errors_allowed(10, 0.1, 1.0), "delta must be between 0 and 1"),
        (lambda tree: Tree(tree.root, (1.0,)), "Each node needs one cost"),
        (lambda tree: Tree(tree.root, (1.0, -1.0)), "0 nats or more"),
        (lambda tree: Tree(tree.root, (1.0, math.nan)), "0 nats or more"),
    ],
)
def test_bad_input_is_refused(call_it, said: str) -> None:
    tree = Tree(Node("a", (("value", False, Node("b")),)), (1.0, 1.0))
    with pytest.raises(ConfigError, match=said):
        call_it(tree)
