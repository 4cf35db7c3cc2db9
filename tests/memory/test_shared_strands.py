"""Strands that sequences share: read once for all, whatever the tree, and freed with their last reader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import GROUPED, TokenTable, assert_equal_to, ids_of, new_memory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plait.memory import DenseStrand, FrozenStrand, Memory, Rows, allocated_bytes, attend
from plait.ops import Mask, Partial

TABLE = TokenTable(GROUPED)
Node = tuple[int, list[Any]]

# A node holds some tokens and has children; leaves are sequences.
trees = st.recursive(
    st.tuples(st.integers(0, 90), st.just([])),
    lambda children: st.tuples(st.integers(0, 90), st.lists(children, min_size=1, max_size=4)),
    max_leaves=8,
)


def grown(node: Node, memory: Memory, past: list[int], seed: int) -> list[tuple[Memory, list[int]]]:
    """The memories of all leaves below a node, and the ids that each holds."""
    length, children = node
    new = ids_of(length, seed)
    if new:
        TABLE.write(memory, new)
    ids = [*past, *new]
    if not children:
        return [(memory, ids)]
    found = []
    for number, child in enumerate(children):
        found += grown(child, memory.fork(), ids, 10 * seed + number + 1)
    return found


class Visits:
    """Counts visits to strands, and the queries in each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queries: list[tuple[int, int]] = []
        attend_strand = FrozenStrand.attend

        def counted(
            strand: FrozenStrand, q: Tensor, first: int, mask: Mask, window: int | None = None
        ) -> Partial:
            self.queries.append((len(strand), len(q)))
            return attend_strand(strand, q, first, mask, window)

        monkeypatch.setattr(FrozenStrand, "attend", counted)


class Operations(TorchDispatchMode):
    """Counts what torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@settings(max_examples=80, deadline=None)
@given(tree=trees, rows=st.integers(1, 3))
def test_every_leaf_of_any_tree_equals_reading_it_alone(tree: Node, rows: int) -> None:
    leaves = grown(tree, new_memory(), [], 1)
    news = [ids_of(rows + number % 2, seed=number) for number in range(len(leaves))]
    segments = Rows([(len(new), len(ids)) for new, (_, ids) in zip(news, leaves, strict=True)])
    out = attend([memory for memory, _ in leaves], *TABLE.rows([i for new in news for i in new]), segments)
    for segment, new, (_, ids) in zip(segments.segments, news, leaves, strict=True):
        assert_equal_to(out[segment.rows], TABLE.answer(ids, new))


def test_each_level_of_a_tree_is_visited_once_with_all_queries_below_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaf: Node = (5, [])
    leaves = grown((100, [(70, [leaf, leaf, leaf]), (80, [leaf, leaf])]), new_memory(), [], 1)
    visits = Visits(monkeypatch)
    attend([memory for memory, _ in leaves], *TABLE.rows([1] * 5), Rows([(1, len(ids)) for _, ids in leaves]))
    # Each tail holds five tokens and the new one; tails are no strands that are shared.
    shared = [visit for visit in visits.queries if visit[0] != 6]
    assert sorted(shared) == sorted([(100, 5), (70, 3), (80, 2)])


def test_a_chain_of_short_strands_with_one_reader_is_joined() -> None:
    memory = new_memory()
    for token in ids_of(200):
        memory = memory.fork()
        TABLE.write(memory, [token])
    assert len(memory.all_strands()) <= 1 + 200 // 64 + 1
    assert_equal_to(TABLE.write(memory, [7]), TABLE.answer(ids_of(200), [7]))


@pytest.mark.parametrize("length", [1, 8, 64, 2000])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_stacking_takes_no_more_operations_than_it_saves(length: int, count: int) -> None:
    memory = new_memory()
    TABLE.write(memory, ids_of(length))
    shared = [memory.fork() for _ in range(count)]
    apart = [memory.fork() for _ in range(count)]
    for twin in apart:
        twin.strands = [strand.copied() for strand in twin.strands]
    counts = []
    for twins in (shared, apart):
        with torch.inference_mode(), Operations() as operations:
            attend(twins, *TABLE.rows([1] * count), Rows([(1, length)] * count))
        counts.append(operations.count)
    # Cutting the result into two costs what the second visit did; from three sequences on it pays.
    assert counts[0] < counts[1] + (2 if count == 2 else 0)


def test_a_fork_that_ends_frees_its_suffix_and_nothing_else() -> None:
    memory = new_memory()
    TABLE.write(memory, ids_of(100))
    twins = [memory.fork() for _ in range(3)]
    for seed, twin in enumerate(twins):
        TABLE.write(twin, ids_of(40, seed))

    def held(*memories: Memory) -> int:
        return allocated_bytes([strand for one in memories for strand in one.held()])

    prefix = held(memory)
    suffix = held(twins[0]) - prefix
    assert suffix == twins[0].tail.nbytes() > 0
    assert held(*twins) == prefix + 3 * suffix
    probe = TABLE.answer([*ids_of(100), *ids_of(40, 1)], [3])
    twins[0].truncate(0)
    assert held(*twins[1:]) == prefix + 2 * suffix
    assert_equal_to(TABLE.write(twins[1], [3]), probe)
    assert isinstance(twins[1].tail, DenseStrand)


def test_in_half_precision_sharing_is_as_near_as_copies() -> None:
    memory = new_memory(spec="dense:dtype=bf16")
    TABLE.write(memory, ids_of(100))
    twins = [memory.fork() for _ in range(4)]
    apart = [memory.fork() for _ in range(4)]
    for twin in apart:
        twin.strands = [strand.copied() for strand in twin.strands]
    outs = [attend(some, *TABLE.rows([1, 2, 3, 4]), Rows([(1, 100)] * 4)) for some in (twins, apart)]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)
