"""A strand that is moved answers as if its keys had been written at the new positions."""

from __future__ import annotations

import pytest
import torch
from memory_oracle import (
    GROUPED,
    LAYERS,
    TokenTable,
    assert_equal_to,
    ids_of,
    new_memory,
    turned,
)
from torch import Tensor

from plait.memory import DenseStrand, Heads, Memory
from plait.ops import rotate


def written_at(heads: Heads, start: int, ids: list[int], table: TokenTable) -> DenseStrand:
    """A strand of tokens written at positions `start` and on, in the frame of position 0."""
    strand = DenseStrand(heads, start=start)
    _, k, v = table.rows(ids)
    if heads.rope is not None:
        k = rotate(k, heads.rope.angles(torch.arange(start, start + len(ids))))
    strand.append(k, v)
    return strand


def answered(strand: DenseStrand, ids: list[int], table: TokenTable, position: int) -> tuple[Tensor, Memory]:
    """Outputs of tokens that are read at a position behind the strand, through `attend`."""
    memory = Memory(strand.heads, new_memory().plan)
    memory.strands = [strand]
    memory.tail = DenseStrand(strand.heads, start=position)
    return memory.attend(*table.rows(ids)), memory


@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.parametrize("by", [-4096, -17, 1, 4096])
def test_moving_a_strand_equals_writing_it_elsewhere(layer: str, by: int) -> None:
    heads = LAYERS[layer]
    table, past, new = TokenTable(heads), ids_of(300), ids_of(4, seed=1)
    moved = written_at(heads, 7000, past, table).moved(by)
    assert (moved.position, moved.offset, moved.start) == (7000 + by, by, 7000)
    rewritten = written_at(heads, 7000 + by, past, table)
    given, _ = answered(moved, new, table, 12000)
    wanted, _ = answered(rewritten, new, table, 12000)
    assert_equal_to(given, wanted)


@pytest.mark.parametrize("by", [-250, 39])
def test_a_moved_strand_among_others_equals_brute_force(by: int) -> None:
    table, first, second, new = TokenTable(GROUPED), ids_of(20), ids_of(30, seed=1), ids_of(5, seed=2)
    memory = new_memory()
    memory.strands = [
        written_at(GROUPED, 0, first, table),
        written_at(GROUPED, 300, second, table).moved(by),
    ]
    memory.tail = DenseStrand(GROUPED, start=400)
    given = memory.attend(*table.rows(new))

    positions = [*range(20), *range(300 + by, 330 + by), *range(400, 405)]
    q, _, _ = table.rows(new)
    _, k, v = table.rows([*first, *second, *new])
    queries = turned(q, positions[-5:], GROUPED)
    keys = turned(k, positions, GROUPED).repeat_interleave(2, dim=1)
    scores = torch.einsum("qhd,thd->hqt", queries, keys) * GROUPED.scale
    later = torch.tensor(positions) > torch.tensor(positions[-5:])[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    wanted = torch.einsum("hqt,thv->qhv", weights, v.double().repeat_interleave(2, dim=1))
    assert_equal_to(given, wanted)


def test_windows_and_masks_count_the_moved_positions() -> None:
    table, past = TokenTable(GROUPED), ids_of(10)
    strand = written_at(GROUPED, 0, past, table).moved(90)
    memory = Memory(GROUPED, new_memory().plan, window=5)
    memory.strands = [strand]
    memory.tail = DenseStrand(GROUPED, start=100)
    given = memory.attend(*table.rows([3]))
    near, _ = answered(written_at(GROUPED, 96, past[6:], table), [3], table, 100)
    assert_equal_to(given, near)


def test_moving_there_and_back_shares_storage_and_changes_no_bit() -> None:
    table = TokenTable(GROUPED)
    strand = written_at(GROUPED, 50, ids_of(40), table)
    back = strand.moved(11).moved(-11)
    assert back.keys.data_ptr() == strand.keys.data_ptr()
    assert strand.offset == back.offset == 0
    one, _ = answered(strand, [1, 2], table, 200)
    other, _ = answered(back, [1, 2], table, 200)
    assert torch.equal(one, other)


@pytest.mark.parametrize("at", [0, 1, 17, 40])
def test_a_strand_that_is_split_answers_as_before(at: int) -> None:
    table, past, new = TokenTable(GROUPED), ids_of(40), ids_of(3, seed=1)
    strand = written_at(GROUPED, 5, past, table).moved(8)
    front, back = strand.split(at)
    assert (len(front), len(back)) == (at, 40 - at)
    assert (front.position, back.position) == (13, 13 + at)
    memory = new_memory()
    memory.strands = [front, back]
    memory.tail = DenseStrand(GROUPED, start=60)
    whole, _ = answered(strand, new, table, 60)
    assert_equal_to(memory.attend(*table.rows(new)), whole)


def test_tokens_are_appended_in_the_frame_of_the_tail() -> None:
    table, past, new = TokenTable(GROUPED), ids_of(30), ids_of(6, seed=1)
    wanted = table.answer(past, new)
    memory = new_memory()
    table.write(memory, past)
    # A tail in a frame of its own: the keys are turned less, and so are the queries that visit it.
    memory.strands = [memory.tail]
    memory.tail = DenseStrand(GROUPED, offset=27, start=3)
    assert_equal_to(table.write(memory, new, [2, 3]), wanted)
    _, k, _ = table.rows(new[:1])
    rope = GROUPED.rope
    assert rope is not None
    stored = rotate(k, rope.angles(torch.tensor([3])))
    torch.testing.assert_close(memory.tail.keys[:, 0], stored[0])
