"""The window policy sees the first and the last tokens, forgets the rest, and says when that shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_methods import both, first_and_last
from memory_oracle import (
    GROUPED,
    TokenTable,
    assert_equal_to,
    ids_of,
    new_memory,
    random_tree,
    refusal,
    within,
)

from plait.errors import ConfigError
from plait.memory import FrozenStrand, Memory, allocated_bytes
from plait.memory.policies import window as window_policy

TABLE = TokenTable(GROUPED)
TOKEN_BYTES = 2 * GROUPED.num_kv_heads * GROUPED.head_dim * 4
EXAMPLES = settings(deadline=None, max_examples=40, derandomize=True)


def small(slack: int) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    patch.setattr(window_policy, "_SLACK", slack)
    return patch


@EXAMPLES
@given(
    size=st.integers(1, 40),
    sinks=st.integers(0, 12),
    window=st.none() | st.integers(1, 40),
    slack=st.integers(1, 9),
    length=st.integers(1, 90),
    cuts=st.lists(st.integers(0, 90), max_size=12),
    forks=st.booleans(),
)
def test_any_chunking_equals_a_dense_mask(
    size: int, sinks: int, window: int | None, slack: int, length: int, cuts: list[int], forks: bool
) -> None:
    ids = ids_of(length)
    memory = new_memory(spec=f"window:size={size},sinks={sinks}", window=window)
    bounds = [0, *sorted(min(cut, length) for cut in cuts), length]
    outs = []
    patch = small(slack)
    try:
        for low, high in zip(bounds, bounds[1:], strict=False):  # noqa: RUF007
            if forks:
                memory = memory.fork()
            outs.append(TABLE.write(memory, ids[low:high]))
    finally:
        patch.undo()
    wanted = TABLE.answer([], ids, sees=both(first_and_last(size, sinks), within(window)))
    assert_equal_to(torch.cat(outs), wanted)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 2])
def test_drafts_deeper_than_the_window_at_the_very_beginning(size: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(size)
    sees = [both(first_and_last(size, sinks), within(window)) for sinks in range(8)]
    for sinks in range(8):
        for past in range(5):
            tree = random_tree(9, generator)
            memory = new_memory(spec=f"window:size={size},sinks={sinks}", window=window)
            ids, draft = ids_of(past), ids_of(9, seed=1)
            if past:
                TABLE.write(memory, ids)
            given_ = memory.attend(*TABLE.rows(draft), mask=tree)
            assert_equal_to(given_, TABLE.answer(ids, draft, parents=tree.parents, sees=sees[sinks]))


def test_what_is_dropped_was_out_of_sight_at_full_size() -> None:
    ids = ids_of(1800)
    memory = new_memory(spec="window:size=300,sinks=4")
    outs = TABLE.write(memory, ids, [900, 1000, 1001, 1500])
    assert sum(map(len, memory.all_strands())) < 1000
    wanted = TABLE.answer(ids[:1780], ids[1780:], sees=first_and_last(300, 4))
    assert_equal_to(outs[1780:], wanted)


def fill(memory: Memory, length: int, step: int) -> int:
    """Write tokens without asking for answers; the most bytes that were allocated between calls."""
    _, k, v = TABLE.rows(ids_of(step))
    most = 0
    for _ in range(length // step):
        memory.append(k, v)
        memory.commit()
        most = max(most, memory.nbytes())
    return most


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_bytes_are_bounded_over_twenty_thousand_tokens(step: int) -> None:
    memory = new_memory(spec="window:size=500,sinks=4")
    most = fill(memory, 20_000, step)
    assert len(memory) == 20_000 // step * step
    assert most <= 1.25 * (500 + 4 + 2 * 256) * TOKEN_BYTES
    assert sum(map(len, memory.all_strands())) <= 500 + 4 + 2 * 256


def test_bytes_are_bounded_when_a_sequence_is_forked_often() -> None:
    memory = new_memory(spec="window:size=200,sinks=4")
    most = 0
    for _ in range(120):
        fill(memory, 50, 10)
        memory = memory.fork()
        most = max(most, memory.nbytes())
    assert most <= 1.25 * (200 + 4 + 2 * 256 + 50) * TOKEN_BYTES


def test_a_shared_strand_is_not_copied_while_it_is_in_sight() -> None:
    memory = new_memory(spec="window:size=400,sinks=4")
    fill(memory, 600, 100)
    twins = [memory.fork() for _ in range(5)]
    for twin in twins:
        fill(twin, 20, 1)
    held = [strand for one in (memory, *twins) for strand in one.held()]
    assert allocated_bytes(held) <= 1.3 * 600 * TOKEN_BYTES + 5 * 32 * TOKEN_BYTES


def test_tokens_are_copied_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, plain = [], FrozenStrand.copied

    def counted(strand: FrozenStrand) -> FrozenStrand:
        copies.append(len(strand))
        return plain(strand)

    monkeypatch.setattr(FrozenStrand, "copied", counted)
    fill(new_memory(spec="window:size=100,sinks=4"), 3000, 1)
    # Once for each 256 tokens: those that are kept, and the first ones.
    assert 10 <= len([length for length in copies if length > 4]) <= 3000 // 256
    assert len(copies) <= 2 * (3000 // 256)


def test_first_tokens_do_not_keep_a_shared_strand_allocated() -> None:
    memory = new_memory(spec="window:size=800,sinks=4")
    fill(memory, 1000, 100)
    twin = memory.fork()
    assert twin.nbytes() >= 1000 * TOKEN_BYTES
    fill(twin, 3000, 50)
    assert twin.nbytes() <= 1.25 * (800 + 4 + 2 * 256) * TOKEN_BYTES


def test_a_narrow_model_drops_what_it_cannot_see() -> None:
    memory = new_memory(spec="window:size=4000", window=100)
    assert fill(memory, 3000, 10) <= 1.25 * (100 + 4 + 2 * 256) * TOKEN_BYTES


@pytest.mark.parametrize(("size", "sinks", "window"), [(6, 2, None), (6, 0, None), (1, 3, None), (30, 2, 5)])
def test_going_back_is_exact_or_refused(
    size: int, sinks: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slack, length = 5, 50
    monkeypatch.setattr(window_policy, "_SLACK", slack)
    sees = both(first_and_last(size, sinks), within(window))
    ids, new = ids_of(length), ids_of(4, seed=1)
    chunks = [*range(1, 20), 30, *range(31, length)]
    refused = []
    for back_to in range(length + 1):
        memory = new_memory(spec=f"window:size={size},sinks={sinks}", window=window)
        TABLE.write(memory, ids, chunks)
        before = memory.nbytes()
        message = refusal(memory, back_to)
        if message is not None:
            assert f"Cannot go back to {back_to} tokens: window:size={size}" in message
            refused.append(back_to)
            assert (len(memory), memory.nbytes()) == (length, before)
        kept = ids[:back_to] if message is None else ids
        assert_equal_to(TABLE.write(memory, new, [1]), TABLE.answer(kept, new, sees=sees))
    # Nothing is dropped of the first tokens, nor of what the last few positions see.
    assert refused == list(range(sinks + 1, refused[-1] + 1))
    assert length - 2 * slack - 1 <= refused[-1] < length - slack


def test_the_error_says_where_one_can_go_back_to() -> None:
    memory = new_memory(spec="window:size=100,sinks=4")
    fill(memory, 1000, 100)
    message = (
        r"Cannot go back to 640 tokens: window:size=100 has dropped tokens 4 to 643, which the next one "
        r"would see. Go back to at least 743, or to at most 4"
    )
    with pytest.raises(ConfigError, match=message):
        memory.truncate(640)
    memory.truncate(743)
    memory.truncate(4)
    assert len(memory) == 4
