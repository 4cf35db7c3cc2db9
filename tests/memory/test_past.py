"""A past changes in all its layers or in none."""

from __future__ import annotations

import pytest
import torch
from memory_oracle import GROUPED, LAYERS, TokenTable, assert_equal_to, ids_of, new_memory

from plait.errors import ConfigError, IncompatibleError
from plait.memory import LinearState, Memory, Past, Tree

TABLES = [TokenTable(GROUPED), TokenTable(LAYERS["no-positions"])]


def new_past(*windows: int | None, spec: str = "full") -> Past:
    """Two layers of attention, each perhaps with a window of its own."""
    one, other = windows or (None, None)
    return Past([new_memory(TABLES[0].heads, spec, one), new_memory(TABLES[1].heads, spec, other)])


def write(past: Past, ids: list[int], tree: Tree | None = None) -> list[torch.Tensor]:
    """Attend in every layer; nothing is committed."""
    return [
        layer.attend(*table.rows(ids), mask=tree)
        for layer, table in zip(past.layers, TABLES, strict=True)
        if isinstance(layer, Memory)
    ]


def test_every_layer_follows() -> None:
    past, ids = new_past(), ids_of(30)
    write(past, ids[:20])
    past.commit()
    twin = past.fork()
    write(past, ids[20:], Tree([-1, *range(9)]))
    past.commit([0, 1, 2])
    assert (len(past), len(twin)) == (23, 20)
    past.truncate(5)
    for one, kept in ((past, ids[:5]), (twin, ids[:20])):
        for out, table in zip(write(one, [1, 2]), TABLES, strict=True):
            assert_equal_to(out, table.answer(kept, [1, 2]))


def test_a_layer_that_cannot_be_stored_is_named_and_all_layers_go_on() -> None:
    past = new_past(spec="gear:group=4,buffer=8,rank=2")
    ids = ids_of(20)
    first, second = past.layers
    assert isinstance(first, Memory)
    assert isinstance(second, Memory)
    first.attend(*TABLES[0].rows(ids))
    q, k, v = TABLES[1].rows(ids)
    k[12] = torch.nan
    second.attend(q, k, v)
    with pytest.raises(ConfigError, match=r"Layer 1: gear cannot store keys that are NaN"):
        past.commit()
    assert [len(layer) for layer in past.layers] == [20, 20]
    assert (first.pending, second.pending, len(first.strands), len(second.strands)) == (0, 0, 1, 0)
    past.truncate(12)
    write(past, [1, 2])
    past.commit()
    assert len(second.strands) == 1


def test_bytes_are_those_of_all_layers() -> None:
    past = new_past()
    write(past, ids_of(100))
    assert past.nbytes() == sum(layer.nbytes() for layer in past.layers) > 0
    state = LinearState.empty(torch.zeros(2), 4, 4)
    assert Past([*past.layers, state]).nbytes() == past.nbytes() + state.nbytes()


def lengths(past: Past) -> list[tuple[int, int]]:
    return [(len(layer), layer.pending) for layer in past.layers if isinstance(layer, (Memory, LinearState))]


def test_a_length_that_one_layer_refuses_changes_no_layer() -> None:
    # The wide layer still holds what the narrow one has dropped.
    past = new_past(None, 10, spec="window:size=2000,sinks=0")
    for seed in range(7):
        write(past, ids_of(100, seed))
        past.commit()
    before = lengths(past)
    past.layers[0].check_truncate(300)
    with pytest.raises(ConfigError, match="Cannot go back to 300 tokens"):
        past.truncate(300)
    assert lengths(past) == before


def hybrid() -> Past:
    memory, state = new_memory(GROUPED), LinearState.empty(torch.zeros(2), 4, 4)
    memory.attend(*TABLES[0].rows(ids_of(6)))
    state.advance(torch.ones(2, 4, 4), 6)
    past = Past([memory, state])
    past.commit()
    memory.attend(*TABLES[0].rows(ids_of(3)))
    state.advance(torch.zeros(2, 4, 4), 3)
    return past


def test_a_state_refuses_for_the_attention_layers_too() -> None:
    past = hybrid()
    with pytest.raises(IncompatibleError, match="linear-attention"):
        past.commit([0, 1])
    with pytest.raises(IncompatibleError, match="linear-attention"):
        past.truncate(8)
    assert lengths(past) == [(9, 3), (9, 3)]


def test_a_hybrid_goes_back_to_its_last_commit() -> None:
    past = hybrid()
    past.truncate(6)
    assert lengths(past) == [(6, 0), (6, 0)]
    state = past.layers[1]
    assert isinstance(state, LinearState)
    assert torch.equal(state.sums, torch.ones(2, 4, 4))


def test_a_past_that_failed_half_way_through_the_layers_can_be_restored() -> None:
    past = hybrid()
    past.commit()
    memory = past.layers[0]
    assert isinstance(memory, Memory)
    memory.attend(*TABLES[0].rows([1, 2]))
    assert len(memory) == 11
    past.truncate(9)
    assert lengths(past) == [(9, 0), (9, 0)]
