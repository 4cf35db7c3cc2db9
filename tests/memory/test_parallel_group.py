"""Parallel contexts equal a dense computation of their formula, in any order and grouping."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from memory_oracle import LAYERS, TokenTable, assert_equal_to, biases, ids_of, new_memory, turned
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError
from plait.memory import DenseStrand, Memory, Notes, Rows, Strand, allocated_bytes, attend
from plait.memory.arrangements import ParallelGroup
from plait.ops import Everything, Partial, rotate

PREFIX = ids_of(9)
CONTEXTS = [ids_of(length, seed) for seed, length in enumerate((20, 33, 1, 12), start=1)]
QUESTION = ids_of(6, seed=9)


def strand_at(table: TokenTable, ids: list[int], position: int) -> Strand:
    strand = DenseStrand(table.heads, start=position)
    _, k, v = table.rows(ids)
    if table.heads.rope is not None:
        k = rotate(k, table.heads.rope.angles(torch.arange(position, position + len(ids))))
    strand.append(k, v)
    return strand.frozen()


def with_contexts(
    table: TokenTable, contexts: list[list[int]], temperature: float = 1.0, scale: float = 1.0
) -> Memory:
    """A memory of the prefix and a group of contexts."""
    memory = new_memory(table.heads)
    table.write(memory, PREFIX)
    strands = [[strand_at(table, ids, len(PREFIX))] for ids in contexts]
    memory.append_strand(ParallelGroup(strands, temperature=temperature, scale=scale))
    return memory


def dense(
    table: TokenTable, contexts: list[list[int]], new: list[int], temperature: float, scale: float
) -> Tensor:
    """The formula over the whole table of scores, in float64: (Q, H, V)."""
    heads = table.heads
    group = heads.num_heads // heads.num_kv_heads
    at = len(PREFIX)
    positions = [*range(at)]
    for ids in contexts:
        positions += range(at, at + len(ids))
    first = at + max(map(len, contexts))
    positions += range(first, first + len(new))
    ids = [*PREFIX, *(token for context in contexts for token in context), *new]
    q = turned(table.q[new], positions[-len(new) :], heads)
    k = turned(table.k[ids], positions, heads).repeat_interleave(group, dim=1)
    v = table.v[ids].double().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,thd->qht", q, k) * heads.scale
    if heads.softcap is not None:
        scores = heads.softcap * torch.tanh(scores / heads.softcap)
    apart = [[query - key for key in positions] for query in positions[-len(new) :]]
    scores = scores + biases(heads, apart).transpose(0, 1)
    stop = len(ids) - len(new)
    own = torch.ones(len(new), len(new), dtype=torch.bool).triu(1)[:, None]
    scores[:, :, stop:] = scores[:, :, stop:].masked_fill(own, -math.inf)
    other = torch.cat([scores[:, :, :at], scores[:, :, stop:]], dim=-1)
    other_v = torch.cat([v[:at], v[stop:]])
    inside = scores[:, :, at:stop] / temperature
    logs = torch.stack([other.logsumexp(-1), scale * temperature * inside.logsumexp(-1)])
    weights = logs.softmax(dim=0)
    outs = [
        torch.einsum("qht,thv->qhv", s.softmax(-1), x) for s, x in ((other, other_v), (inside, v[at:stop]))
    ]
    return weights[0][..., None] * outs[0] + weights[1][..., None] * outs[1]


@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.parametrize(("temperature", "scale"), list(itertools.product((1.0, 0.9, 0.5), (1.0, 0.9, 0.7))))
def test_a_group_equals_the_formula_over_all_scores(layer: str, temperature: float, scale: float) -> None:
    table = TokenTable(LAYERS[layer])
    memory = with_contexts(table, CONTEXTS, temperature, scale)
    assert len(memory) == len(PREFIX) + 33
    given = table.write(memory, QUESTION, [1, 4])
    assert_equal_to(given, dense(table, CONTEXTS, QUESTION, temperature, scale))


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_one_context_is_ordinary_reading(layer: str) -> None:
    table = TokenTable(LAYERS[layer])
    memory = with_contexts(table, CONTEXTS[:1])
    assert_equal_to(table.write(memory, QUESTION), table.answer([*PREFIX, *CONTEXTS[0]], QUESTION))


def test_order_and_pieces_of_contexts_do_not_matter() -> None:
    table = TokenTable(LAYERS["all-at-once"])
    wanted = with_contexts(table, CONTEXTS, 0.8, 0.9).attend(*table.rows(QUESTION))
    for order in itertools.permutations(CONTEXTS):
        given = with_contexts(table, list(order), 0.8, 0.9).attend(*table.rows(QUESTION))
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    pieces = []
    for ids in CONTEXTS:
        strand = strand_at(table, ids, len(PREFIX))
        pieces.append(list(strand.split(1)) if len(ids) > 1 else [strand])
    memory = new_memory(table.heads)
    table.write(memory, PREFIX)
    memory.append_strand(ParallelGroup(pieces, temperature=0.8, scale=0.9))
    torch.testing.assert_close(memory.attend(*table.rows(QUESTION)), wanted, atol=1e-5, rtol=1e-5)


def test_copies_of_a_context_add_the_logarithm_of_their_number() -> None:
    table = TokenTable(LAYERS["grouped"])
    q = table.q[:3]
    strand = strand_at(table, CONTEXTS[0], 4)
    one, four = (ParallelGroup([[strand]] * n, temperature=0.8, scale=0.7) for n in (1, 4))
    alone, together = (group.attend(q, 100, Everything()) for group in (one, four))
    torch.testing.assert_close(together.out, alone.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.lse, alone.lse + 0.7 * 0.8 * math.log(4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by", [-5, 3000])
def test_a_group_moves_as_a_whole_and_its_contexts_may_have_frames_of_their_own(by: int) -> None:
    table = TokenTable(LAYERS["grouped"])
    here = [[strand_at(table, ids, 9)] for ids in CONTEXTS]
    there = [[strand_at(table, ids, 9 + by)] for ids in CONTEXTS]
    mixed = [[strand_at(table, ids, 700).moved(9 - 700)] for ids in CONTEXTS]
    rope = table.heads.rope
    assert rope is not None
    positions = torch.arange(9 + by + 33, 9 + by + 33 + 6)
    wanted = ParallelGroup(there, temperature=0.9).attend(
        rotate(table.q[QUESTION], rope.angles(positions)), int(positions[0]), Everything()
    )
    for contexts in (here, mixed):
        group = ParallelGroup(contexts, temperature=0.9).moved(by)
        assert (group.position, len(group)) == (9 + by, 33)
        q = rotate(table.q[QUESTION], rope.angles(positions - group.offset))
        given = group.attend(q, int(positions[0]), Everything())
        torch.testing.assert_close(given.out, wanted.out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(given.lse, wanted.lse, atol=1e-5, rtol=1e-5)


def test_a_model_window_counts_positions_that_contexts_share() -> None:
    table = TokenTable(LAYERS["grouped"])
    memory = Memory(table.heads, new_memory().plan, 15)
    table.write(memory, PREFIX)
    memory.append_strand(ParallelGroup([[strand_at(table, ids, len(PREFIX))] for ids in CONTEXTS]))
    given = memory.attend(*table.rows(QUESTION[:1]))
    # From position 42 on, keys before position 28 are out of sight: only the longest context and the 20 are.
    seen = CONTEXTS[1][19:]
    short = [ids[19:] for ids in CONTEXTS if len(ids) > 19]
    assert short == [CONTEXTS[0][19:], seen]
    strands = [[strand_at(table, ids, 28)] for ids in short]
    lone = new_memory(table.heads)
    lone.strands, lone.tail = [], DenseStrand(table.heads, start=28)
    lone.append_strand(ParallelGroup(strands))
    assert_equal_to(given, lone.attend(*table.rows(QUESTION[:1])))


def test_forks_read_a_group_once_and_equal_lone_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TokenTable(LAYERS["grouped"])
    memory = with_contexts(table, CONTEXTS, 0.9, 0.8)
    twins = [memory.fork() for _ in range(3)]
    assert allocated_bytes([s for twin in twins for s in twin.held()]) == memory.nbytes()
    visits = []
    (group,) = [strand for strand in memory.strands if isinstance(strand, ParallelGroup)]
    attend_alone = ParallelGroup.attend

    def counted(self: ParallelGroup, q: Tensor, *rest: Any) -> Partial:
        visits.append(len(q))
        return attend_alone(self, q, *rest)

    monkeypatch.setattr(ParallelGroup, "attend", counted)
    out = attend(twins, *table.rows(QUESTION), Rows([(2, len(twin)) for twin in twins]))
    assert visits == [6]
    assert group in twins[0].strands
    for number in range(3):
        new = QUESTION[2 * number : 2 * number + 2]
        assert_equal_to(out[2 * number : 2 * number + 2], dense(table, CONTEXTS, new, 0.9, 0.8))


def test_a_group_cannot_be_cut_but_can_be_taken_back_whole() -> None:
    table = TokenTable(LAYERS["grouped"])
    memory = with_contexts(table, CONTEXTS)
    table.write(memory, QUESTION)
    with pytest.raises(ConfigError, match="4 parallel contexts stand at the same positions 9 to 41"):
        memory.truncate(20)
    assert len(memory) == 48
    memory.truncate(43)
    assert_equal_to(table.write(memory, [5]), dense(table, CONTEXTS, [QUESTION[0], 5], 1.0, 1.0)[1:])
    memory.truncate(9)
    assert_equal_to(table.write(memory, [5]), table.answer(PREFIX, [5]))


def test_bytes_are_those_of_the_contexts_and_a_copy_has_its_own() -> None:
    table = TokenTable(LAYERS["grouped"])
    strands = [[strand_at(table, ids, 9)] for ids in CONTEXTS]
    group = ParallelGroup(strands, temperature=0.5)
    copied = group.copied()
    assert group.nbytes() == allocated_bytes([context[0] for context in strands])
    assert allocated_bytes([group, copied]) == group.nbytes() + copied.nbytes()
    q = table.q[:2]
    for given, wanted in zip(
        copied.attend(q, 99, Everything()), group.attend(q, 99, Everything()), strict=True
    ):
        assert torch.equal(given, wanted)
    other = group.weighted(temperature=1.0, scale=0.7)
    assert (other.temperature, other.scale, other.nbytes()) == (1.0, 0.7, group.nbytes())


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"scale": -1.0}, {"temperature": math.nan}])
def test_settings_must_be_above_0(settings: dict[str, float]) -> None:
    strand = strand_at(TokenTable(LAYERS["grouped"]), [1, 2], 3)
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be above 0"):
        ParallelGroup([[strand]], **settings)


def test_contexts_must_start_together_and_where_the_sequence_ends() -> None:
    table = TokenTable(LAYERS["grouped"])
    for contexts in ([], [[]], [[strand_at(table, [1], 3)], [strand_at(table, [1], 4)]]):
        with pytest.raises(ConfigError, match="start at one position"):
            ParallelGroup(contexts)
    memory = new_memory()
    with pytest.raises(ConfigError, match="starts at position 0"):
        memory.append_strand(ParallelGroup([[strand_at(table, [1], 3)]]))


def test_policies_that_would_cut_a_group_or_note_its_tokens_refuse() -> None:
    table = TokenTable(LAYERS["grouped"])
    memory = new_memory(spec="window:size=20,sinks=12")
    table.write(memory, PREFIX)
    with pytest.raises(ConfigError, match="cannot be cut"):
        memory.append_strand(ParallelGroup([[strand_at(table, ids, 9)] for ids in CONTEXTS]))

    class Counts(Notes):
        def tensors(self) -> list[Tensor]:
            return []

    memory = new_memory()
    memory.codec_notes = Counts()
    with pytest.raises(IncompatibleError, match="Counts"):
        memory.append_strand(ParallelGroup([[strand_at(table, [1, 2], 0)]]))


def test_heads_of_the_contexts_are_left_alone() -> None:
    table = TokenTable(LAYERS["all-at-once"])
    strand = strand_at(table, [1, 2], 0)
    ParallelGroup([[strand]], temperature=0.5)
    assert strand.heads is table.heads
