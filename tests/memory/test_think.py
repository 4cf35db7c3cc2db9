"""ThinK drops the channels that the last queries use least, packs the rest, and leaves everything else as it was."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import GROUPED, TokenTable, assert_equal_to, ids_of, new_memory, read_with_detours, turned

from plait.errors import ConfigError, IncompatibleError
from plait.memory import FrozenStrand, Heads, Memory, MemoryPlan, Rows, attend
from plait.memory.codecs import GEAR, Dense, ThinK
from plait.memory.codecs.think import ThinStrand
from plait.memory.coded import CodedStrand

EXAMPLES = settings(deadline=None, max_examples=40, derandomize=True)
TABLE = TokenTable(GROUPED)
SPEC = "think:ratio=0.4,recent=4,window=5,chunk=3"
KEPT = 4  # floor(0.6 * 8)


def choice_of(memory: Memory) -> Any:
    """What the codec keeps beside the strands."""
    return memory.codec_notes


def best_channels(past: list[int], window: int, kept: int) -> list[list[int]]:
    """For each key head, the channels of the largest `|q|^2 |k|^2`, in float64, one number at a time."""
    q = turned(TABLE.q[past], range(len(past)), GROUPED)[-window:]
    k = turned(TABLE.k[past], range(len(past)), GROUPED)
    chosen = []
    for head in range(2):
        scores = []
        for channel in range(8):
            of_queries = sum(
                float(q[t, h, channel]) ** 2 for t in range(len(q)) for h in (2 * head, 2 * head + 1)
            )
            of_keys = sum(float(k[t, head, channel]) ** 2 for t in range(len(k)))
            scores.append((of_queries * of_keys, channel))
        chosen.append(sorted(channel for _, channel in sorted(scores, reverse=True)[:kept]))
    return chosen


def zeroed_answer(past: list[int], new: list[int], channels: list[list[int]], pruned: int) -> torch.Tensor:
    """Dense attention, float64, with the other channels of the first `pruned` keys set to 0."""
    ids = [*past, *new]
    q = turned(TABLE.q[new], range(len(past), len(ids)), GROUPED)
    k = turned(TABLE.k[ids], range(len(ids)), GROUPED)
    for head, kept in enumerate(channels):
        dropped = [channel for channel in range(8) if channel not in kept]
        k[:pruned, head, dropped] = 0.0
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, TABLE.v[ids].double()))
    scores = torch.einsum("qhd,thd->hqt", q, k) * GROUPED.scale
    order = torch.arange(len(ids))
    hidden = order[None] > len(past) + torch.arange(len(new))[:, None]
    return torch.einsum("hqt,thv->qhv", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def read_prompt(memory: Memory, ids: list[int], step: int = 9) -> torch.Tensor:
    """Read a prompt in pieces, as the engine does."""
    outs = []
    for low in range(0, len(ids), step):
        outs.append(memory.attend(*TABLE.rows(ids[low : low + step])))
        memory.commit(is_prompt=low + step < len(ids))
    return torch.cat(outs)


@EXAMPLES
@given(length=st.integers(8, 60), step=st.integers(1, 60), new=st.integers(1, 6), seed=st.integers(0, 99))
def test_it_equals_dense_attention_with_the_dropped_channels_zeroed(
    length: int, step: int, new: int, seed: int
) -> None:
    past, later = ids_of(length, seed), ids_of(new, seed + 1)
    memory = new_memory(spec=SPEC)
    assert_equal_to(read_prompt(memory, past, step), TABLE.answer([], past))
    channels = best_channels(past, 5, KEPT)
    assert choice_of(memory).key_channels.tolist() == channels
    out = memory.attend(*TABLE.rows(later))
    assert_equal_to(out, zeroed_answer(past, later, channels, length - 4 if length - 4 >= 3 else 0))


def test_tokens_that_grow_old_lose_the_same_channels_and_the_newest_lose_none() -> None:
    past = ids_of(30)
    memory = new_memory(spec=SPEC)
    read_prompt(memory, past)
    channels = choice_of(memory).key_channels
    later = ids_of(20, seed=1)
    for index, token in enumerate(later):
        given = memory.attend(*TABLE.rows([token]))
        pruned = 26 + index // 3 * 3
        before = [*past, *later[:index]]
        assert_equal_to(given, zeroed_answer(before, [token], channels.tolist(), pruned))
        memory.commit()
        assert 4 <= len(memory.tail) < 7
    assert choice_of(memory).key_channels is channels


@pytest.mark.parametrize("inner", ["dense", "gear:group=8,buffer=8", "dense:dtype=fp16"])
def test_nothing_dropped_is_the_inner_codec_bit_for_bit(inner: str) -> None:
    ids = ids_of(60)
    memories = [new_memory(spec=spec) for spec in (f"think:ratio=0,{inner}", inner)]
    given, wanted = (TABLE.write(memory, ids, [20, 40]) for memory in memories)
    assert torch.equal(given, wanted)
    assert memories[0].nbytes() == memories[1].nbytes()


def test_kept_channels_are_packed_and_counted() -> None:
    memory = new_memory(spec=SPEC)
    read_prompt(memory, ids_of(54))
    [thin] = memory.strands
    assert isinstance(thin, ThinStrand)
    assert isinstance(thin.inner, FrozenStrand)
    assert tuple(thin.inner.keys.shape) == (2, 50, KEPT)
    assert thin.inner.values.shape[2] == 8
    assert thin.nbytes() == 50 * 2 * (KEPT + 8) * 4 + 2 * KEPT * 2
    # The queries that chose are gone.
    assert memory.nbytes() == thin.nbytes() + memory.tail.nbytes()


@pytest.mark.parametrize(
    ("size", "ratio", "kept"), [(64, 0.4, 38), (10, 0.9, 1), (64, 0.5, 32), (10, 0.3, 7), (8, 0.125, 7)]
)
def test_the_number_of_channels_is_the_floor(size: int, ratio: float, kept: int) -> None:
    heads = Heads(1, 1, size, scale=1.0)
    memory = Memory(heads, MemoryPlan(codec=ThinK(ratio=ratio, recent=0, chunk=1)))
    q = torch.randn(4, 1, size, generator=torch.Generator().manual_seed(0))
    memory.attend(q, q, q)
    memory.commit()
    assert choice_of(memory).key_channels.shape == (1, kept)


@EXAMPLES
@given(seed=st.integers(0, 999), kept=st.integers(1, 3))
def test_orthogonal_channels_make_the_greedy_choice_the_best_one(seed: int, kept: int) -> None:
    # With one key for each channel the products of different channels have no entry in common.
    generator = torch.Generator().manual_seed(seed)
    heads = Heads(1, 1, 6, scale=1.0)
    k = torch.diag(torch.rand(6, generator=generator) + 0.5)[:, None]
    q = torch.randn(6, 1, 6, generator=generator)
    memory = Memory(heads, MemoryPlan(codec=ThinK(ratio=1 - kept / 6, recent=0, chunk=1, window=6)))
    memory.attend(q, k, k)
    memory.commit()

    def loss(channels: tuple[int, ...]) -> float:
        dropped = [channel for channel in range(6) if channel not in channels]
        return float((q[:, 0, dropped] @ k[:, 0, dropped].T).norm())

    best = min(combinations(range(6), kept), key=loss)
    assert loss(tuple(choice_of(memory).key_channels[0].tolist())) == pytest.approx(loss(best))


def test_sequences_of_a_batch_choose_for_themselves() -> None:
    memories = [new_memory(spec=SPEC) for _ in range(2)]
    pasts = [ids_of(20, seed) for seed in (0, 1)]
    attend(memories, *TABLE.rows([*pasts[0], *pasts[1]]), Rows([(20, 0), (20, 0)]))
    for memory, past in zip(memories, pasts, strict=True):
        memory.commit()
        assert choice_of(memory).key_channels.tolist() == best_channels(past, 5, KEPT)
    assert best_channels(pasts[0], 5, KEPT) != best_channels(pasts[1], 5, KEPT)


def test_what_was_taken_back_has_no_say() -> None:
    past = ids_of(20)
    memory = new_memory(spec=SPEC)
    read_with_detours(memory, TABLE, past, 15)
    assert len(memory) == 20
    assert choice_of(memory).key_channels.tolist() == best_channels(past, 5, KEPT)
    memory.truncate(2)
    assert choice_of(memory).key_channels is None
    read_prompt(memory, past[2:])
    assert choice_of(memory).key_channels.tolist() == best_channels(past, 5, KEPT)


def test_forks_note_for_themselves() -> None:
    memory = new_memory(spec="think:recent=4,window=5,chunk=30,ratio=0.4")
    TABLE.write(memory, ids_of(20))
    twin = memory.fork()
    TABLE.write(memory, ids_of(30, seed=1))
    assert choice_of(memory).key_channels is not None
    assert choice_of(twin).key_channels is None
    TABLE.write(twin, ids_of(30, seed=2))
    assert choice_of(twin).key_channels.tolist() == best_channels([*ids_of(20), *ids_of(30, seed=2)], 5, KEPT)


def test_dropped_values_answer_with_their_mean() -> None:
    past = ids_of(40)
    memory = new_memory(spec="think:ratio=0,value_ratio=0.25,recent=0,chunk=1,window=5")
    read_prompt(memory, past)
    [thin] = memory.strands
    assert isinstance(thin, ThinStrand)
    assert isinstance(thin.inner, FrozenStrand)
    assert thin.inner.values.shape[2] == 6
    values = TABLE.v[past].transpose(0, 1).clone()
    kept = choice_of(memory).value_channels.long()
    dropped = torch.ones(2, 8, dtype=torch.bool).scatter(1, kept, False)
    filled = torch.where(dropped[:, None], values.mean(1, keepdim=True), values)
    keys = turned(TABLE.k[past], range(40), GROUPED).float().transpose(0, 1)
    plain = FrozenStrand(GROUPED, keys, filled)
    q = TABLE.q[:3]
    given, wanted = (s.attend(q, 20, Rows([(3, 20)]).segments[0].mask) for s in (thin, plain))
    assert_equal_to(given.out, wanted.out)
    assert_equal_to(given.lse, wanted.lse)
    # What the last queries read is largest in the channels that stay.
    last = turned(TABLE.q[past], range(40), GROUPED)[-5:].float()
    mask = Rows([(5, 35)]).segments[0].mask
    read = (
        FrozenStrand(GROUPED, keys, values)
        .attend(last, 35, mask)
        .out.square()
        .sum(0)
        .unflatten(0, (2, 2))
        .sum(1)
    )
    assert all(read[g][dropped[g]].max() <= read[g][~dropped[g]].min() for g in range(2))
    unseen = thin.attend(q, 0, mask).out[:0]
    assert unseen.shape == (0, 4, 8)


def test_parts_of_a_strand_share_and_move_as_one() -> None:
    memory = new_memory(spec=SPEC)
    read_prompt(memory, ids_of(54))
    [thin] = memory.strands
    assert isinstance(thin, ThinStrand)
    front, back = thin.split(20)
    assert (len(front), len(back), back.position) == (20, 30, 20)
    assert back.nbytes() == thin.nbytes()
    assert back.copied().nbytes() < thin.nbytes()
    moved = back.moved(5)
    assert (moved.position, moved.inner.position, back.inner.position) == (25, 25, 20)


def test_another_codec_stores_what_is_kept() -> None:
    memory = new_memory(spec=f"{SPEC},gear:group=4,buffer=4,rank=2,sparsity=0")
    assert memory.plan.codec == ThinK(
        recent=4, window=5, chunk=3, inner=GEAR(group=4, buffer=4, rank=2, sparsity=0.0)
    )
    read_prompt(memory, ids_of(55))
    [thin] = memory.strands
    assert isinstance(thin, ThinStrand)
    # Of the 51 old tokens, whole groups of 4.
    assert isinstance(thin.inner, CodedStrand)
    assert len(thin) == 48
    assert thin.inner.dense().keys.shape[2] == KEPT
    assert thin.nbytes() == thin.inner.nbytes() + 2 * KEPT * 2


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("think:ratio=1", ConfigError, r"ThinK.ratio must be a number in \[0, 1\)"),
        ("think:recent=-1", ConfigError, r"ThinK.recent must be a whole number in \[0, inf\)"),
        ("think:window=0", ConfigError, r"ThinK.window must be a whole number in \[1, inf\)"),
        ("think:ratio=0.9", ConfigError, "ThinK.ratio must leave a channel of 8. Got 0.9"),
        ("think:value_ratio=0.9", ConfigError, "ThinK.value_ratio must leave a channel of 8. Got 0.9"),
        ("think,saq", IncompatibleError, "Codec think cannot hold saq"),
        ("think,think", IncompatibleError, "Codec think cannot hold think"),
        ("gear,think", IncompatibleError, "Codec gear cannot be followed by think"),
        ("saq,gear", IncompatibleError, "Codec saq cannot be followed by gear"),
        (
            "think:value_ratio=0.4,gear:group=16,buffer=16,rank=2",
            ConfigError,
            "GEAR.group must divide the 8 value channels",
        ),
        (
            "think:ratio=0.5,gear:group=16,buffer=16,rank=5",
            ConfigError,
            "at most the head size 4. Got 5 and 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(spec: str, kind: type[ConfigError], message: str) -> None:
    with pytest.raises(kind, match=message):
        new_memory(spec=spec)


def test_a_stack_is_one_codec_with_one_text() -> None:
    text = "think:ratio=0.5,gear:bits=8,group=8,buffer=8"
    codec = MemoryPlan.parse(text).codec
    assert codec == ThinK(ratio=0.5, inner=GEAR(bits=8, group=8, buffer=8))
    assert str(codec) == text
    assert ThinK.from_json(codec.to_json()) == codec
    assert MemoryPlan.parse("think,dense:dtype=bf16").codec == ThinK(inner=Dense(dtype="bf16"))
