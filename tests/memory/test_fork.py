"""Forks share what is stored and never see each other's tokens."""

from __future__ import annotations

import pytest
import torch
from memory_oracle import GROUPED, TokenTable, assert_equal_to, ids_of, new_memory
from torch import Tensor

from plait.errors import ConfigError
from plait.memory import DenseStrand, FrozenStrand, Memory, Tree, allocated_bytes

PREFIX = ids_of(50)


def forked() -> tuple[TokenTable, Memory, Memory]:
    table, memory = TokenTable(GROUPED), new_memory()
    table.write(memory, PREFIX, [20])
    return table, memory, memory.fork()


def contents(memory: Memory) -> list[Tensor]:
    """Every key and value, copied."""
    return [
        part.clone()
        for strand in memory.all_strands()
        if isinstance(strand, FrozenStrand)
        for part in (strand.keys, strand.values)
    ]


def test_both_twins_continue_as_one_that_was_never_forked() -> None:
    table, memory, twin = forked()
    for one, seed in ((memory, 1), (twin, 2)):
        new = ids_of(20, seed)
        assert_equal_to(table.write(one, new, [1, 2, 9]), table.answer(PREFIX, new))


def test_what_one_writes_changes_no_bit_of_the_other() -> None:
    table, memory, twin = forked()
    before, probe = contents(twin), table.rows([5])
    lone = twin.fork().attend(*probe)
    table.write(memory, ids_of(60, seed=1), range(1, 60))
    memory.truncate(30)
    table.write(memory, ids_of(200, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(before, contents(twin), strict=True))
    assert torch.equal(twin.attend(*probe), lone)


def test_storage_is_shared_and_counted_once() -> None:
    _, memory, twin = forked()
    (strand,), (shared,) = memory.all_strands(), twin.all_strands()
    assert strand is shared
    assert allocated_bytes([*memory.held(), *twin.held()]) == memory.nbytes() == twin.nbytes()


def test_the_prefix_is_not_copied() -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    table.write(memory, PREFIX)
    keys, values = memory.tail.keys.data_ptr(), memory.tail.values.data_ptr()
    twins = [memory.fork() for _ in range(4)]
    for one in (memory, *twins):
        (strand,) = one.all_strands()
        assert isinstance(strand, FrozenStrand)
        assert (strand.keys.data_ptr(), strand.values.data_ptr()) == (keys, values)


def test_a_shared_strand_has_no_way_to_grow() -> None:
    _, memory, _ = forked()
    (strand,) = memory.all_strands()
    assert not isinstance(strand, DenseStrand)
    for name in ("append", "keep", "truncate"):
        assert not hasattr(strand, name)


def test_a_fork_of_a_fork_is_independent_of_both() -> None:
    table, memory, twin = forked()
    middle = ids_of(7, seed=1)
    table.write(twin, middle)
    grandchild = twin.fork()
    tails = {id(memory): [], id(twin): middle, id(grandchild): middle}
    for seed, one in enumerate((memory, twin, grandchild), start=2):
        new = ids_of(9, seed)
        assert_equal_to(table.write(one, new, [4]), table.answer([*PREFIX, *tails[id(one)]], new))
    assert [len(one) for one in (memory, twin, grandchild)] == [59, 66, 66]


def test_forking_at_every_token_changes_nothing() -> None:
    table, memory, ids = TokenTable(GROUPED), new_memory(), ids_of(25)
    outs = []
    for token in ids:
        memory = memory.fork()
        outs.append(table.write(memory, [token]))
    assert_equal_to(torch.cat(outs), table.answer([], ids))


def test_an_empty_memory_can_be_forked() -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    twin = memory.fork()
    assert len(twin) == twin.nbytes() == 0
    assert_equal_to(table.write(twin, PREFIX), table.answer([], PREFIX))
    assert len(memory) == 0


def test_pending_rows_are_committed_by_a_fork() -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    memory.attend(*table.rows(PREFIX))
    twin = memory.fork()
    assert memory.pending == twin.pending == 0
    assert_equal_to(table.write(twin, [1, 2]), table.answer(PREFIX, [1, 2]))


def test_a_pending_draft_tree_cannot_be_forked() -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    memory.attend(*table.rows([1, 2, 3]), mask=Tree([-1, 0, 0]))
    with pytest.raises(ConfigError, match="nodes from the root on"):
        memory.fork()
    assert (len(memory), memory.pending) == (3, 3)


@pytest.mark.parametrize("length", [0, 1, 19, 49, 50])
def test_a_twin_that_goes_back_into_the_shared_part_leaves_the_other_alone(length: int) -> None:
    table, memory, twin = forked()
    twin.truncate(length)
    new = ids_of(12, seed=1)
    assert_equal_to(table.write(twin, new, [1]), table.answer(PREFIX[:length], new))
    assert_equal_to(table.write(memory, new, [1]), table.answer(PREFIX, new))


def test_a_cut_twin_counts_the_storage_that_it_keeps_alive() -> None:
    _, memory, twin = forked()
    twin.truncate(1)
    assert twin.nbytes() == memory.nbytes() > 0
    # Two views of one storage are no more than the storage.
    assert allocated_bytes([*memory.held(), *twin.held()]) == memory.nbytes()
