"""Masks as structure equal masks as tables of booleans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import ConfigError
from plait.ops import Causal, Everything, Far, Mask, SomeQueries, Tree

EXAMPLES = settings(deadline=None, max_examples=1000, derandomize=True)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 9) -> Tree:
    size = draw(st.integers(1, max_nodes))
    return Tree([-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))])


def is_ancestor(tree: Tree, node: int, of: int) -> bool:
    while of > node:
        of = tree.parents[of]
    return of == node


def depth(tree: Tree, node: int) -> int:
    return 0 if node == 0 else 1 + depth(tree, tree.parents[node])


def assert_views_equal(
    mask: Mask, table: Tensor, first_query: int, first_key: int, window: int | None, blocks: list[range]
) -> None:
    for block in blocks:
        view = mask.view(first_query, block, first_key, table.shape[1], window)
        given_ = torch.zeros(len(block), table.shape[1], dtype=torch.bool)
        assert 0 <= view.low <= view.high <= table.shape[1]
        if view.visible is not None:
            assert view.visible.shape == (len(block), view.high - view.low)
        given_[:, view.low : view.high] = True if view.visible is None else view.visible
        assert torch.equal(given_, table[block.start : block.stop])


def blocks_of(num_queries: int, size: int) -> list[range]:
    return [range(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]


@EXAMPLES
@given(
    first_query=st.integers(0, 30),
    first_key=st.integers(0, 40),
    num_queries=st.integers(1, 12),
    num_keys=st.integers(0, 30),
    window=st.none() | st.integers(1, 35),
    block=st.integers(1, 12),
    is_causal=st.booleans(),
)
def test_causal_and_unmasked_views_equal_the_table(
    first_query: int,
    first_key: int,
    num_queries: int,
    num_keys: int,
    window: int | None,
    block: int,
    is_causal: bool,
) -> None:
    def sees(row: int, column: int) -> bool:
        distance = first_query + row - first_key - column
        if is_causal:
            return distance >= 0 and (window is None or distance < window)
        return window is None or abs(distance) < window

    rows = [[sees(row, column) for column in range(num_keys)] for row in range(num_queries)]
    table = torch.tensor(rows, dtype=torch.bool).view(num_queries, num_keys)
    mask: Mask = Causal() if is_causal else Everything()
    assert_views_equal(mask, table, first_query, first_key, window, blocks_of(num_queries, block))


@EXAMPLES
@given(
    tree=trees(),
    root=st.integers(0, 20),
    before=st.integers(0, 25),
    num_past=st.integers(0, 12),
    window=st.none() | st.integers(1, 30),
    block=st.integers(1, 9),
    cut=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    holds=st.sampled_from(["the past", "all nodes", "some nodes"]),
)
def test_tree_views_equal_the_table(
    tree: Tree,
    root: int,
    before: int,
    num_past: int,
    window: int | None,
    block: int,
    cut: tuple[int, int],
    holds: str,
) -> None:
    num_nodes, first_node = len(tree.parents), 0
    if holds == "the past":
        first_key = max(root - before, 0)
        num_keys = min(num_past, root - first_key)
    elif holds == "all nodes":
        # The strand holds `num_past` tokens of the past, then the nodes.
        num_past = min(num_past, root)
        first_key, num_keys = root - num_past, num_past + num_nodes
    else:
        first_node, last_node = sorted(min(node, num_nodes) for node in cut)
        first_key, num_keys = root + first_node, last_node - first_node

    def sees(node: int, column: int) -> bool:
        position = root + depth(tree, node)
        past = min(max(root - first_key, 0), num_keys)
        if column < past:
            return window is None or position - first_key - column < window
        other = first_node + column - past
        close = window is None or depth(tree, node) - depth(tree, other) < window
        return is_ancestor(tree, other, node) and close

    rows = [[sees(node, column) for column in range(num_keys)] for node in range(num_nodes)]
    table = torch.tensor(rows, dtype=torch.bool).view(num_nodes, num_keys)
    assert_views_equal(tree, table, root, first_key, window, blocks_of(num_nodes, block))


@st.composite
def segments(draw: st.DrawFn) -> tuple[Mask, int]:
    """A mask and the number of queries that it is for."""
    kind = draw(st.sampled_from([Causal, Everything, Tree]))
    if kind is Tree:
        tree = draw(trees())
        return tree, len(tree.parents)
    return kind(), draw(st.integers(1, 12))


@EXAMPLES
@given(
    segment=segments(),
    first_query=st.integers(0, 20),
    before=st.integers(0, 25),
    window=st.none() | st.integers(1, 30),
    distance=st.integers(1, 30),
    block=st.integers(1, 12),
    holds_own=st.booleans(),
)
def test_far_views_equal_the_table(
    segment: tuple[Mask, int],
    first_query: int,
    before: int,
    window: int | None,
    distance: int,
    block: int,
    holds_own: bool,
) -> None:
    base, count = segment
    first_key = max(first_query - before, 0)
    # A strand of the past, or the tail, which ends with the segment's own rows.
    num_keys = first_query - first_key + (count if holds_own else 0)
    depths = base.depths(count).tolist()
    positions = [*range(first_key, first_query), *(first_query + depth for depth in depths)]
    table = seen_by(base, count, first_query, first_key, num_keys, window)
    for row in range(count):
        for column in range(num_keys):
            table[row, column] &= first_query + depths[row] - positions[column] >= distance
    mask = Far(base, distance, count)
    assert_views_equal(mask, table, first_query, first_key, window, blocks_of(count, block))
    assert torch.equal(mask.depths(count), base.depths(count))


@EXAMPLES
@given(segment=segments(), cut=st.tuples(st.integers(0, 12), st.integers(0, 12)), block=st.integers(1, 12))
def test_some_queries_see_what_they_see_among_all(
    segment: tuple[Mask, int], cut: tuple[int, int], block: int
) -> None:
    base, count = segment
    low, high = sorted(min(end, count) for end in cut)
    table = seen_by(base, count, 7, 2, 5 + count, 9)[low:high]
    mask = SomeQueries(base, range(low, high), count)
    assert_views_equal(mask, table, 7, 2, 9, blocks_of(high - low, block))
    assert torch.equal(mask.depths(high - low), base.depths(count)[low:high])


def seen_by(
    mask: Mask, count: int, first_query: int, first_key: int, num_keys: int, window: int | None
) -> Tensor:
    """What one query after the other sees, as a table."""
    table = torch.zeros(count, num_keys, dtype=torch.bool)
    for row in range(count):
        view = mask.view(first_query, range(row, row + 1), first_key, num_keys, window)
        table[row, view.low : view.high] = True if view.visible is None else view.visible[0]
    return table


def test_what_is_far_enough_for_all_needs_no_table() -> None:
    assert Far(Causal(), 4, 3).view(10, range(3), 0, 7) == (0, 7, None)
    assert Far(Causal(), 4, 3).view(10, range(3), 9, 7)[:2] == (0, 0)


@EXAMPLES
@given(trees())
def test_depths_and_ancestors_of_a_tree(tree: Tree) -> None:
    size = len(tree.parents)
    assert tree.depths(size).tolist() == [depth(tree, node) for node in range(size)]
    table = [[j <= i and is_ancestor(tree, j, i) for j in range(size)] for i in range(size)]
    assert tree.ancestors.tolist() == table


def test_a_chain_sees_what_causal_queries_see() -> None:
    chain, table = Tree([-1, 0, 1, 2]), torch.zeros(4, 9, dtype=torch.bool)
    view = Causal().view(5, range(4), 0, 9, 3)
    table[:, view.low : view.high] = True if view.visible is None else view.visible
    assert_views_equal(chain, table, 5, 0, 3, [range(4)])


def test_a_view_of_what_all_queries_see_needs_no_table() -> None:
    assert Causal().view(10, range(4), 0, 11).visible is None
    assert Causal().view(10, range(4), 2, 8, window=12).visible is None
    assert Everything().view(0, range(4), 7, 9).visible is None
    assert Tree([-1, 0, 0]).view(10, range(3), 0, 10).visible is None


def test_a_window_narrows_the_range_of_keys() -> None:
    assert Causal().view(1000, range(1), 0, 2000, window=8)[:2] == (993, 1001)


@pytest.mark.parametrize("parents", [[0], [1, -1], [-1, -1], [-1, 1], [-1, 0, 2], [-1, -2], [-2]])
def test_parents_must_come_before_their_children(parents: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"Tree\.parents must start with -1"):
        Tree(parents)


def test_a_tree_refuses_another_number_of_rows() -> None:
    with pytest.raises(ConfigError, match=r"A tree of 3 nodes needs as many rows. Got a segment of 2"):
        Tree([-1, 0, 1]).depths(2)
