"""Taking tokens back, and keeping one path of a draft tree, leave no trace of what was dropped."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from memory_oracle import (
    GROUPED,
    LAYERS,
    TokenTable,
    assert_equal_to,
    ids_of,
    new_memory,
    paths_of,
    random_tree,
    within,
)

from plait.errors import ConfigError
from plait.memory import Memory, Rows, Tree, attend

PAST = ids_of(23)
TREE = Tree([-1, 0, 0, 1, 1, 2, 4, 6])
DRAFT = ids_of(8, seed=3)


def written(table: TokenTable, ids: Sequence[int] = PAST, window: int | None = None) -> Memory:
    memory = new_memory(table.heads, window=window)
    table.write(memory, ids)
    return memory


@pytest.mark.parametrize("length", range(24))
def test_truncating_equals_never_having_written(length: int) -> None:
    table = TokenTable(GROUPED)
    memory, fresh = written(table), written(table, PAST[:length])
    memory.truncate(length)
    assert len(memory) == length
    new = ids_of(5, seed=1)
    # The same strands with the same tokens: the same bits.
    assert torch.equal(table.write(memory, new, [2]), table.write(fresh, new, [2]))


@pytest.mark.parametrize("length", range(0, 24, 3))
def test_truncating_into_shared_strands_equals_never_having_written(length: int) -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    for low, high in ((0, 6), (6, 7), (7, 15), (15, 23)):
        memory = memory.fork()
        table.write(memory, PAST[low:high])
    memory.truncate(length)
    assert len(memory) == length
    assert sum(map(len, memory.all_strands())) == length
    assert all(map(len, memory.strands)), "an empty strand would be visited for nothing"
    new = ids_of(5, seed=1)
    assert_equal_to(table.write(memory, new, [2]), table.answer(PAST[:length], new))


def test_truncating_to_the_present_length_changes_nothing() -> None:
    table = TokenTable(GROUPED)
    memory = written(table)
    memory.attend(*table.rows([1, 2]))
    memory.truncate(25)
    assert (len(memory), memory.pending) == (25, 2)


def test_pending_rows_can_be_taken_back_in_part() -> None:
    table = TokenTable(GROUPED)
    memory = written(table)
    memory.attend(*table.rows(DRAFT))
    memory.truncate(23 + 3)
    assert memory.pending == 3
    memory.commit([0, 1])
    assert_equal_to(table.write(memory, [5]), table.answer([*PAST, *DRAFT[:2]], [5]))


@pytest.mark.parametrize("length", [-1, 24, 10**9])
def test_a_length_that_is_not_there_is_refused(length: int) -> None:
    memory = written(TokenTable(GROUPED))
    with pytest.raises(ConfigError, match=f"truncate takes a length from 0 to 23. Got {length}"):
        memory.truncate(length)
    assert len(memory) == 23


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_nodes_of_a_tree_answer_as_the_last_token_of_their_path(layer: str, window: int | None) -> None:
    table = TokenTable(LAYERS[layer])
    given = written(table, window=window).attend(*table.rows(DRAFT), mask=TREE)
    assert_equal_to(given, table.answer(PAST, DRAFT, parents=TREE.parents, sees=within(window)))
    for node, path in enumerate(paths_of(TREE)):
        plain = table.answer(PAST, [DRAFT[i] for i in path], sees=within(window))
        assert_equal_to(given[node], plain[-1])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("path", [[], *paths_of(TREE)], ids=str)
def test_committing_a_path_equals_plain_decoding_of_it(path: list[int], window: int | None) -> None:
    table = TokenTable(GROUPED)
    memory = written(table, window=window)
    memory.attend(*table.rows(DRAFT), mask=TREE)
    memory.commit(path)
    accepted = [*PAST, *(DRAFT[i] for i in path)]
    plain = written(table, accepted, window=window)
    assert (len(memory), memory.pending) == (len(accepted), 0)
    torch.testing.assert_close(memory.tail.keys, plain.tail.keys, atol=1e-6, rtol=0)
    new = ids_of(4, seed=2)
    assert_equal_to(table.write(memory, new), table.answer(accepted, new, sees=within(window)))


def test_many_rounds_of_drafts_equal_plain_decoding() -> None:
    table, memory, generator = TokenTable(GROUPED), new_memory(), torch.Generator().manual_seed(5)
    accepted: list[int] = []
    for round_ in range(30):
        tree = random_tree(int(torch.randint(1, 9, (), generator=generator)), generator)
        draft = ids_of(len(tree.parents), seed=100 + round_)
        given = memory.attend(*table.rows(draft), mask=tree)
        assert_equal_to(given, table.answer(accepted, draft, parents=tree.parents))
        paths = [[], *paths_of(tree)]
        path = paths[int(torch.randint(0, len(paths), (), generator=generator))]
        memory.commit(path)
        accepted += [draft[i] for i in path]
    assert len(memory) == len(accepted) > 30


def test_trees_of_several_sequences_in_one_batch() -> None:
    table = TokenTable(GROUPED)
    lengths, trees = (23, 5, 11), (TREE, Tree([-1]), Tree([-1, 0, 1, 0, 3]))
    memories = [written(table, PAST[:length]) for length in lengths]
    drafts = [ids_of(len(tree.parents), seed=7 + i) for i, tree in enumerate(trees)]
    rows = Rows([(len(tree.parents), length, tree) for length, tree in zip(lengths, trees, strict=True)])
    given = attend(memories, *table.rows([i for draft in drafts for i in draft]), rows)
    for segment, length, draft, tree in zip(rows.segments, lengths, drafts, trees, strict=True):
        wanted = table.answer(PAST[:length], draft, parents=tree.parents)
        assert_equal_to(given[segment.rows], wanted)
    for memory, length, draft, path in zip(
        memories, lengths, drafts, ([0, 2, 5], [0], [0, 3, 4]), strict=True
    ):
        memory.commit(path)
        accepted = [*PAST[:length], *(draft[i] for i in path)]
        assert_equal_to(table.write(memory, [9]), table.answer(accepted, [9]))


def test_rejecting_a_draft_is_truncating_to_where_it_began() -> None:
    table = TokenTable(GROUPED)
    memory, fresh = written(table), written(table)
    memory.attend(*table.rows(DRAFT), mask=TREE)
    memory.truncate(23)
    assert (memory.pending, memory.draft) == (0, None)
    assert torch.equal(table.write(memory, [3]), table.write(fresh, [3]))


@pytest.mark.parametrize(
    "path", [[1], [0, 3], [0, 0], [0, 1, 0], [0, 2, 3], [1, 0], [0, 8], [-1], [0, -8]], ids=str
)
def test_a_path_that_is_no_path_is_refused_and_changes_nothing(path: list[int]) -> None:
    table = TokenTable(GROUPED)
    memory = written(table)
    memory.attend(*table.rows(DRAFT), mask=TREE)
    with pytest.raises(ConfigError, match="indices of the 8 pending rows that follow each other: nodes from"):
        memory.commit(path)
    assert (len(memory), memory.pending) == (31, 8)
    memory.commit(torch.tensor([0, 1]))
    assert_equal_to(table.write(memory, [3]), table.answer([*PAST, DRAFT[0], DRAFT[1]], [3]))


@pytest.mark.parametrize("path", [[1], [0, 2], [1, 0], [0, 1, 2, 3], [-1]], ids=str)
def test_rows_of_a_run_are_kept_from_the_first_on(path: list[int]) -> None:
    table = TokenTable(GROUPED)
    memory = written(table)
    memory.attend(*table.rows([1, 2, 3]))
    with pytest.raises(ConfigError, match="indices of the 3 pending rows that follow each other: rows from"):
        memory.commit(path)
    assert (len(memory), memory.pending) == (26, 3)


def test_a_branching_draft_cannot_be_committed_whole_but_a_chain_can() -> None:
    table = TokenTable(GROUPED)
    memory = written(table)
    memory.attend(*table.rows(DRAFT), mask=TREE)
    with pytest.raises(ConfigError, match="follow each other"):
        memory.commit()
    chain = written(table)
    chain.attend(*table.rows([1, 2]), mask=Tree([-1, 0]))
    chain.commit()
    assert_equal_to(table.write(chain, [3]), table.answer([*PAST, 1, 2], [3]))


def test_a_draft_tree_is_alone_among_pending_rows() -> None:
    table = TokenTable(GROUPED)
    memory = written(table)
    memory.attend(*table.rows(DRAFT), mask=TREE)
    with pytest.raises(ConfigError, match="A draft tree must be the only pending rows"):
        memory.attend(*table.rows([1]))
    memory.truncate(23)
    memory.attend(*table.rows([1]))
    with pytest.raises(ConfigError, match="next to the 1 rows that are pending"):
        memory.attend(*table.rows(DRAFT), mask=TREE)
    assert (len(memory), memory.pending) == (24, 1)
    _, k, v = table.rows([1])
    with pytest.raises(ConfigError, match="A draft tree must be the only pending rows"):
        memory.append(k, v, Tree([-1]))
    assert (len(memory), memory.pending) == (24, 1)


def test_a_draft_tree_cannot_be_cut() -> None:
    table = TokenTable(GROUPED)
    memory = written(table)
    memory.attend(*table.rows(DRAFT), mask=TREE)
    with pytest.raises(ConfigError, match=r"Cannot cut a draft tree at 25 tokens.*truncate to 23"):
        memory.truncate(25)
    memory.truncate(31)
    assert memory.pending == 8
    memory.truncate(12)
    assert_equal_to(table.write(memory, [3]), table.answer(PAST[:12], [3]))


def test_a_tree_needs_a_row_for_each_node() -> None:
    with pytest.raises(ConfigError, match=r"A tree of 8 nodes needs as many rows. Got a segment of 3"):
        written(TokenTable(GROUPED)).attend(*TokenTable(GROUPED).rows([1, 2, 3]), mask=TREE)
