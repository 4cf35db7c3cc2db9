"""Tokens that are moved answer as if their keys had been written where they now stand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import GROUPED, LAYERS, TokenTable, assert_equal_to, ids_of, new_memory

from plait.errors import ConfigError, IncompatibleError
from plait.memory import FrozenStrand, Heads, LinearState, Memory, MemoryPlan, Notes, Past
from plait.ops import Rope

TABLE = TokenTable(GROUPED)
OLD = ids_of(90)


def edited(
    start: int,
    stop: int,
    middle: list[int],
    *,
    layer: str = "grouped",
    materialise: bool = False,
    spec: str = "full",
) -> tuple[Memory, list[int], TokenTable]:
    """A memory in which [start, stop) of the old tokens were replaced, and the ids it then holds."""
    table = TokenTable(LAYERS[layer])
    source = new_memory(LAYERS[layer], spec)
    table.write(source, OLD, [33, 60])
    memory = source.fork()
    memory.truncate(start)
    table.write(memory, middle)
    memory.splice(source, stop, len(OLD), materialise=materialise)
    return memory, [*OLD[:start], *middle, *OLD[stop:]], table


@pytest.mark.parametrize("materialise", [False, True], ids=["moved", "turned"])
@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.parametrize(
    ("start", "stop", "count"),
    [(10, 10, 7), (10, 40, 0), (0, 5, 2), (50, 70, 20), (90, 90, 3), (0, 90, 4), (20, 89, 1)],
)
def test_an_edited_memory_equals_one_that_read_the_new_tokens(
    layer: str, start: int, stop: int, count: int, materialise: bool
) -> None:
    middle = ids_of(count, seed=1)
    memory, ids, table = edited(start, stop, middle, layer=layer, materialise=materialise)
    new = ids_of(6, seed=2)
    assert len(memory) == len(ids)
    assert_equal_to(table.write(memory, new, [1, 2]), table.answer(ids, new))


def test_moving_touches_no_key_and_turning_copies_keys_only() -> None:
    memory, _, _ = edited(10, 10, ids_of(70, seed=1))
    turned, _, _ = edited(10, 10, ids_of(70, seed=1), materialise=True)
    source = new_memory()
    TABLE.write(source, OLD, [33, 60])
    source.freeze()
    own = {strand.keys.data_ptr() for strand in source.pieces(0, 90) if isinstance(strand, FrozenStrand)}
    assert len(own) == 1
    for one, offset, grown in (
        (memory, 70, 0),
        (turned, 0, 80 * GROUPED.num_kv_heads * GROUPED.head_dim * 4),
    ):
        last = one.strands[-1]
        assert isinstance(last, FrozenStrand)
        assert (last.offset, last.position, len(last)) == (offset, 80, 80)
        assert one.nbytes() == memory.nbytes() + grown


def test_the_memory_that_gave_tokens_is_left_as_it_was() -> None:
    source = new_memory()
    TABLE.write(source, OLD)
    memory = new_memory()
    TABLE.write(memory, [1, 2, 3])
    memory.splice(source, 20, 50)
    TABLE.write(memory, ids_of(40, seed=3), range(1, 40))
    source.truncate(60)
    new = ids_of(9, seed=2)
    assert_equal_to(TABLE.write(source, new, [4]), TABLE.answer(OLD[:60], new))
    held = [1, 2, 3, *OLD[20:50], *ids_of(40, seed=3)]
    assert_equal_to(TABLE.write(memory, new, [4]), TABLE.answer(held, new))


@settings(max_examples=60, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 12), st.booleans()), min_size=1, max_size=6
    )
)
def test_any_edits_in_turn_equal_reading_the_result(edits: list[tuple[float, float, int, bool]]) -> None:
    ids, memory = list(OLD), new_memory()
    TABLE.write(memory, ids)
    for number, (a, b, count, materialise) in enumerate(edits):
        start, stop = sorted((round(a * len(ids)), round(b * len(ids))))
        middle = ids_of(count, seed=number)
        twin = memory.fork()
        twin.truncate(start)
        TABLE.write(twin, middle)
        twin.splice(memory, stop, len(ids), materialise=materialise)
        memory, ids = twin, [*ids[:start], *middle, *ids[stop:]]
    assert_equal_to(TABLE.write(memory, [7, 8]), TABLE.answer(ids, [7, 8]))
    short = [len(strand) < 64 for strand in memory.strands]
    assert not any(one and two for one, two in pairwise(short))


def test_an_edit_and_its_inverse_turned_back_give_the_first_keys() -> None:
    source = new_memory()
    TABLE.write(source, OLD)
    source.freeze()
    (strand,) = source.pieces(30, 90)
    assert isinstance(strand, FrozenStrand)
    back = strand.moved(1234).reframed(0).moved(-1234).reframed(0)
    torch.testing.assert_close(back.keys, strand.keys, atol=1e-5, rtol=1e-5)
    assert (back.position, back.offset) == (strand.position, 0)


def test_chunks_can_change_places() -> None:
    source, memory = new_memory(), new_memory()
    TABLE.write(source, OLD)
    for start, stop in ((70, 90), (0, 30), (30, 70)):
        memory.splice(source, start, stop)
    ids = [*OLD[70:], *OLD[:70]]
    assert_equal_to(TABLE.write(memory, [3, 4]), TABLE.answer(ids, [3, 4]))


def test_an_amplitude_of_the_rotation_is_not_applied_twice() -> None:
    heads = Heads(4, 2, 8, scale=8**-0.5, rope=Rope(GROUPED.rope.frequencies, amplitude=1.3))  # type: ignore[union-attr]
    memory = new_memory(heads)
    table = TokenTable(heads)
    table.write(memory, OLD)
    memory.freeze()
    (strand,) = memory.pieces(0, 90)
    assert isinstance(strand, FrozenStrand)
    turned = strand.moved(50).reframed(0)
    torch.testing.assert_close(turned.keys.norm(dim=-1), strand.keys.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_keys_in_half_precision_are_moved_but_never_joined_across_frames() -> None:
    memory, ids, table = edited(10, 20, [1, 2], spec="dense:dtype=bf16")
    assert [strand.offset for strand in memory.strands] == [0, -8]
    exact = new_memory(spec="dense:dtype=bf16")
    table.write(exact, ids)
    given, wanted = (table.write(one, [5, 6]) for one in (memory, exact))
    assert float((given - wanted).abs().max()) < 0.05


def test_what_was_dropped_cannot_be_moved() -> None:
    source = new_memory(spec="window:size=16,sinks=2")
    ids = ids_of(2000)
    TABLE.write(source, ids, range(100, 2000, 100))
    memory = new_memory(spec="window:size=16,sinks=2")
    with pytest.raises(ConfigError, match="has dropped it"):
        memory.splice(source, 1, 1999)
    assert len(memory) == 0
    memory.splice(source, 1990, 2000)
    assert len(memory) == 10


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 91)])
def test_tokens_that_are_not_there_are_refused(start: int, stop: int) -> None:
    source, memory = new_memory(), new_memory()
    TABLE.write(source, OLD)
    with pytest.raises(ConfigError, match="splice takes tokens from 0 to 90"):
        memory.splice(source, start, stop)


def test_speeds_that_depend_on_the_length_are_refused_once_they_differ() -> None:
    def rule(length: int) -> tuple[torch.Tensor, float]:
        return GROUPED.rope.frequencies / max(1, length / 100), 1.0  # type: ignore[union-attr]

    heads = Heads(4, 2, 8, scale=8**-0.5, rope=Rope(*rule(1), rule=rule))
    table, source, memory = TokenTable(heads), new_memory(heads), new_memory(heads)
    table.write(source, OLD)
    memory.splice(source, 10, 20)
    table.write(source, OLD)
    with pytest.raises(IncompatibleError, match="depend on the length"):
        memory.splice(source, 20, 30)
    assert len(memory) == 10


def test_notes_that_cannot_move_and_states_refuse_by_name() -> None:
    class PlacesNotes(Notes):
        def fork(self) -> PlacesNotes:
            return self

        def truncate(self, length: int) -> None:
            pass

        def tensors(self) -> list[torch.Tensor]:
            return []

    source, memory = new_memory(), new_memory()
    TABLE.write(source, OLD)
    source.policy_notes = memory.policy_notes = PlacesNotes()
    with pytest.raises(IncompatibleError, match="PlacesNotes"):
        memory.splice(source, 0, 5)
    plain = Memory(GROUPED, MemoryPlan())
    state = LinearState.empty(torch.zeros(2), 4, 4)
    with pytest.raises(IncompatibleError, match=r"Layer 1 keeps a recurrent state \(LinearState\)"):
        Past([plain, state]).splice(Past([Memory(GROUPED, MemoryPlan()), state.fork()]), 0, 0)
    with pytest.raises(ConfigError, match="same model"):
        Past([plain]).splice(Past([plain, plain]), 0, 0)
