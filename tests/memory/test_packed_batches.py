"""Sequences that are packed into one batch do not know of each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import GROUPED, LAYERS, TokenTable, assert_equal_to, ids_of, new_memory
from torch import Tensor

from plait.errors import ConfigError
from plait.memory import FrozenStrand, Mask, Memory, Rows, Tree, attend
from plait.ops import Rope

EXAMPLES = settings(deadline=None, max_examples=30, derandomize=True)


def packed(
    table: TokenTable, memories: list[Memory], news: list[list[int]], masks: list[Mask] | None = None
) -> list[Tensor]:
    """Outputs of each sequence's new tokens, attended in one batch."""
    if masks is None:
        rows = Rows([(len(new), len(memory)) for new, memory in zip(news, memories, strict=True)])
    else:
        rows = Rows([(len(n), len(m), mask) for n, m, mask in zip(news, memories, masks, strict=True)])
    out = attend(memories, *table.rows([i for new in news for i in new]), rows)
    return [out[segment.rows] for segment in rows.segments]


@EXAMPLES
@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=5),
    layer=st.sampled_from(sorted(LAYERS)),
)
def test_every_sequence_of_a_batch_equals_brute_force(sizes: list[tuple[int, int]], layer: str) -> None:
    table = TokenTable(LAYERS[layer])
    memories = [new_memory(table.heads) for _ in sizes]
    pasts = [ids_of(past, seed=i) for i, (past, _) in enumerate(sizes)]
    news = [ids_of(new, seed=50 + i) for i, (_, new) in enumerate(sizes)]
    for memory, past in zip(memories, pasts, strict=True):
        table.write(memory, past)
    for given_, past, new in zip(packed(table, memories, news), pasts, news, strict=True):
        if new:
            assert_equal_to(given_, table.answer(past, new))


def test_a_sequence_gives_the_same_bits_whatever_its_neighbours_are() -> None:
    table, mine, new = TokenTable(GROUPED), ids_of(40), [1, 2, 3]

    def among(neighbours: list[list[int]], place: int) -> Tensor:
        pasts = [*neighbours[:place], mine, *neighbours[place:]]
        memories = [new_memory() for _ in pasts]
        for memory, past in zip(memories, pasts, strict=True):
            table.write(memory, past)
        return packed(table, memories, [new] * len(pasts))[place]

    alone = among([], 0)
    assert torch.equal(among([ids_of(9, 1), ids_of(70, 2)], 1), alone)
    assert torch.equal(among([ids_of(3, 3), ids_of(40, 4), []], 0), alone)
    assert torch.equal(among([mine, mine], 2), alone)


def count_visits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The strand and the number of queries of every visit from now on."""
    visits: list[tuple[int, int]] = []
    plain = FrozenStrand.attend

    def counted(strand: FrozenStrand, q: Tensor, *args: object, **kwargs: object) -> object:
        visits.append((id(strand), q.shape[0]))
        return plain(strand, q, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(FrozenStrand, "attend", counted)
    return visits


def test_a_shared_strand_is_visited_once_by_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    table, prefix = TokenTable(GROUPED), ids_of(60)
    memory = new_memory()
    table.write(memory, prefix)
    twins = [memory.fork() for _ in range(3)]
    news = [ids_of(2 + i, seed=10 + i) for i in range(3)]
    visits = count_visits(monkeypatch)
    outs = packed(table, twins, news)
    shared = memory.strands[0]
    assert [queries for strand, queries in visits if strand == id(shared)] == [2 + 3 + 4]
    for out, new in zip(outs, news, strict=True):
        assert_equal_to(out, table.answer(prefix, new))


def test_only_sequences_that_see_all_of_a_strand_share_the_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    table, prefix = TokenTable(GROUPED), ids_of(20)
    memory = new_memory(window=25)
    table.write(memory, prefix)
    near, near_too, far = (memory.fork() for _ in range(3))
    table.write(far, ids_of(15, seed=1))
    visits = count_visits(monkeypatch)
    outs = packed(table, [near, far, near_too], [[1], [2], [3]])
    shared = memory.strands[0]
    assert max(queries for strand, queries in visits if strand == id(shared)) == 2
    window = lambda query, key: query - key < 25  # noqa: E731
    assert_equal_to(outs[0], table.answer(prefix, [1], sees=window))
    assert_equal_to(outs[1], table.answer([*prefix, *ids_of(15, seed=1)], [2], sees=window))
    assert_equal_to(outs[2], table.answer(prefix, [3], sees=window))


def test_shared_strands_and_draft_trees_in_one_batch() -> None:
    table, prefix = TokenTable(GROUPED), ids_of(31)
    memory = new_memory()
    table.write(memory, prefix)
    trees: list[Mask] = [Tree([-1, 0, 0]), Tree([-1, 0, 1, 1]), Tree([-1])]
    twins = [memory.fork() for _ in trees]
    news = [ids_of(n, seed=n) for n in (3, 4, 1)]
    for out, new, tree in zip(packed(table, twins, news, trees), news, trees, strict=True):
        assert isinstance(tree, Tree)
        assert_equal_to(out, table.answer(prefix, new, parents=tree.parents))


def test_forks_under_a_window_policy_still_share_their_strands(monkeypatch: pytest.MonkeyPatch) -> None:
    table, prefix = TokenTable(GROUPED), ids_of(60)
    memory = new_memory(spec="window:size=100,sinks=4")
    table.write(memory, prefix)
    twins = [memory.fork() for _ in range(3)]
    visits = count_visits(monkeypatch)
    outs = packed(table, twins, [[1], [2], [3]])
    # The first tokens and the others; each tail is visited by one.
    assert [queries for _, queries in visits if queries > 1] == [3, 3]
    for out, new in zip(outs, (1, 2, 3), strict=True):
        assert_equal_to(out, table.answer(prefix, [new]))


def test_a_segment_must_continue_its_past() -> None:
    table, memory, other = TokenTable(GROUPED), new_memory(), new_memory()
    table.write(other, [1, 2])
    rows = Rows([(1, 2), (1, 1)])
    with pytest.raises(ConfigError, match=r"Segment 1 starts at position 1, but its past holds 0 tokens"):
        attend([other, memory], *table.rows([1, 2]), rows)
    assert (len(other), len(memory)) == (2, 0)


def test_pasts_and_segments_must_pair_up() -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    with pytest.raises(ConfigError, match=r"Each segment needs one past. Got 1 for 2 segments"):
        attend([memory], *table.rows([1, 2]), Rows([(1, 0), (1, 0)]))
    with pytest.raises(ConfigError, match="A past is given for two segments"):
        attend([memory, memory], *table.rows([1, 2]), Rows([(1, 0), (1, 0)]))
    assert len(memory) == 0


@pytest.mark.parametrize("segment", [(-1, 0), (1, -1)])
def test_negative_lengths_and_positions_are_refused(segment: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="a length and a position from 0 on"):
        Rows([segment])


def test_positions_of_packed_rows() -> None:
    rows = Rows([(3, 10), (4, 5, Tree([-1, 0, 0, 2])), (1, 0)])
    assert rows.positions.tolist() == [10, 11, 12, 5, 6, 6, 7, 0]
    assert rows.last.tolist() == [2, 6, 7]
    assert len(rows) == 8
    assert Rows([]).last.dtype == torch.int64
    with pytest.raises(ConfigError, match="An empty segment has no last row"):
        _ = Rows([(1, 0), (0, 4)]).last


def test_the_length_of_a_tree_is_that_of_its_deepest_path() -> None:
    lengths: list[int] = []

    def rule(length: int) -> tuple[Tensor, float]:
        lengths.append(length)
        return torch.ones(2), 1.0

    rope = Rope(torch.ones(2), rule=rule)
    Rows([(5, 10, Tree([-1, 0, 0, 0, 1])), (3, 7), (0, 4)]).angles(rope, [0, 0, 0])
    assert lengths == [13, 10]
