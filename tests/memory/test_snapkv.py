"""SnapKV keeps what the last queries attend to most, frees the rest, and leaves everything else as it was."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import (
    GROUPED,
    LAYERS,
    TokenTable,
    assert_equal_to,
    ids_of,
    new_memory,
    read_with_detours,
    storage_bound,
    turned,
)

from plait.errors import ConfigError, IncompatibleError
from plait.memory import FrozenStrand, Heads, Memory, MemoryPlan, Past, Rows, attend
from plait.memory.arrangements import ParallelGroup
from plait.memory.codecs import GEAR, SnapKV, ThinK
from plait.memory.codecs.snapkv import EvictedStrand
from plait.memory.codecs.think import ThinStrand
from plait.memory.coded import CodedStrand
from plait.memory.last_queries import LastQueries

EXAMPLES = settings(deadline=None, max_examples=40, derandomize=True)
TABLE = TokenTable(GROUPED)
SPEC = "snapkv:capacity=12,window=5,kernel=1,chunk=3"
WINDOW, KEPT = 5, 7


def read_prompt(memory: Memory, ids: list[int], step: int = 9, table: TokenTable = TABLE) -> torch.Tensor:
    """Read a prompt in pieces, as the engine does."""
    outs = []
    for low in range(0, len(ids), step):
        outs.append(memory.attend(*table.rows(ids[low : low + step])))
        memory.commit(is_prompt=low + step < len(ids))
    return torch.cat(outs)


def evicted_of(memory: Memory) -> EvictedStrand:
    [strand] = [strand for strand in memory.strands if isinstance(strand, EvictedStrand)]
    return strand


def scores_of(table: TokenTable, past: list[int], window: int, kernel: int) -> list[list[float]]:
    """For each key head the score of every token before the window, float64, one query and one key at a time."""
    heads = table.heads
    group = heads.num_heads // heads.num_kv_heads
    q, k = (turned(x[past], range(len(past)), heads) for x in (table.q, table.k))
    old = len(past) - window
    found = []
    for head in range(heads.num_kv_heads):
        sums = [0.0] * old
        for query in range(old, len(past)):
            for own in range(group):
                scores = [
                    float(q[query, head * group + own] @ k[key, head]) * heads.scale
                    for key in range(query + 1)
                ]
                if heads.softcap is not None:
                    scores = [heads.softcap * math.tanh(score / heads.softcap) for score in scores]
                total = sum(map(math.exp, scores))
                for key in range(old):
                    sums[key] += math.exp(scores[key]) / total / group
        half = kernel // 2
        found.append([sum(sums[max(key - half, 0) : key + half + 1]) / kernel for key in range(old)])
    return found


def best_tokens(table: TokenTable, past: list[int], window: int, kernel: int, kept: int) -> list[list[int]]:
    """The tokens that each key head keeps."""
    return [
        sorted(sorted(range(len(scores)), key=lambda key: -scores[key])[:kept])
        for scores in scores_of(table, past, window, kernel)
    ]


def kept_of(table: TokenTable, strand: EvictedStrand, past: list[int]) -> list[list[int]]:
    """Which tokens a strand of plain numbers holds, found by their keys."""
    assert isinstance(strand.inner, FrozenStrand)
    keys = turned(table.k[past], range(len(past)), table.heads)
    return [
        [
            int((keys[: len(strand), head] - one.double()).abs().amax(-1).argmin())
            for one in strand.inner.keys[head]
        ]
        for head in range(table.heads.num_kv_heads)
    ]


def answer(
    table: TokenTable, past: list[int], new: list[int], kept: list[list[int]], old: int
) -> torch.Tensor:
    """Dense attention, float64, in which each key head has dropped all of the first `old` tokens but some."""
    heads = table.heads
    ids = [*past, *new]
    group = heads.num_heads // heads.num_kv_heads
    q = turned(table.q[new], range(len(past), len(ids)), heads)
    k = turned(table.k[ids], range(len(ids)), heads).repeat_interleave(group, dim=1)
    v = table.v[ids].double().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,thd->hqt", q, k) * heads.scale
    if heads.softcap is not None:
        scores = heads.softcap * torch.tanh(scores / heads.softcap)
    order = torch.arange(len(ids))
    scores = scores.masked_fill(order > len(past) + torch.arange(len(new))[:, None], -math.inf)
    for head in range(heads.num_heads):
        dropped = sorted(set(range(old)) - set(kept[head // group]))
        scores[head][:, dropped] = -math.inf
    return torch.einsum("hqt,thv->qhv", scores.softmax(-1), v)


@EXAMPLES
@given(
    layer=st.sampled_from(["grouped", "no-positions", "all-at-once"]),
    length=st.integers(15, 70),
    kernel=st.sampled_from([1, 3, 5]),
    step=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_it_keeps_what_brute_force_keeps_and_answers_from_exactly_that(
    layer: str, length: int, kernel: int, step: int, seed: int
) -> None:
    # Tokens that differ, so that each is known by its key and none ties with another.
    past = torch.randperm(64, generator=torch.Generator().manual_seed(seed)).tolist()[:length]
    length = len(past)
    table, new = TokenTable(LAYERS[layer], seed=seed), ids_of(4, seed + 1)
    memory = new_memory(LAYERS[layer], f"snapkv:capacity=12,window={WINDOW},kernel={kernel},chunk=3")
    assert_equal_to(read_prompt(memory, past, step, table), table.answer([], past))
    wanted = best_tokens(table, past, WINDOW, kernel, KEPT)
    kept = kept_of(table, evicted_of(memory), past)
    assert kept == wanted
    assert len(memory) == length
    assert len(memory.tail) == WINDOW
    assert_equal_to(table.write(memory, new, [1]), answer(table, past, new, kept, length - WINDOW))


def test_the_last_window_stays_as_it_was_written() -> None:
    past = ids_of(40)
    memory, dense = new_memory(spec=SPEC), new_memory()
    for one in (memory, dense):
        read_prompt(one, past)
    assert torch.equal(memory.tail.keys, dense.tail.keys[:, -WINDOW:])
    assert torch.equal(memory.tail.values, dense.tail.values[:, -WINDOW:])


@pytest.mark.parametrize("length", [0, 1, 14])
def test_nothing_is_dropped_of_less_than_capacity_and_chunk(length: int) -> None:
    past, new = ids_of(length), ids_of(1, seed=1)
    memories = [new_memory(spec=spec) for spec in (SPEC, "dense")]
    outs = [TABLE.write(memory, [*past, *new], [length]) for memory in memories]
    assert torch.equal(*outs)
    assert bool(memories[0].strands) == (length == 14)


def test_first_tokens_stay_and_have_their_share_of_attention() -> None:
    past, new = list(range(50)), ids_of(3, seed=1)
    memory = new_memory(spec=f"{SPEC},sinks=4")
    read_prompt(memory, past)
    first, evicted = memory.strands
    assert (len(first), evicted.position, len(evicted)) == (4, 4, 41)
    # Scores are of all that was seen, so that the best of the others are the same with and without first tokens.
    scores = scores_of(TABLE, past, WINDOW, 1)
    kept = [sorted(sorted(range(4, 45), key=lambda key: -of[key])[:KEPT]) for of in scores]
    given = TABLE.write(memory, new, [1])
    assert_equal_to(given, answer(TABLE, past, new, [[*range(4), *one] for one in kept], 45))


def test_tokens_that_come_later_are_chosen_from_as_a_prompt_is() -> None:
    memory = new_memory(spec=SPEC)
    past = ids_of(20)
    read_prompt(memory, past)
    for count, token in enumerate(ids_of(30, seed=1), start=1):
        memory.attend(*TABLE.rows([token]))
        memory.commit()
        # Each run adds what is kept of 15 tokens less the last 5.
        assert len(memory.strands) == 1 + count // 10
        assert len(memory.tail) == WINDOW + count % 10
    assert [len(strand) for strand in memory.strands] == [15, 10, 10, 10]
    assert all(isinstance(s, EvictedStrand) and len(s.inner) == KEPT for s in memory.strands)
    assert len(memory) == 50


def test_bytes_are_those_of_what_is_kept() -> None:
    memory = new_memory(spec=SPEC)
    read_prompt(memory, ids_of(60))
    assert evicted_of(memory).nbytes() == KEPT * 2 * 16 * 4
    # Room for 32 tokens in the tail, and no queries any more.
    assert memory.nbytes() == KEPT * 2 * 16 * 4 + 32 * 2 * 16 * 4
    memory.attend(*TABLE.rows([1]))
    notes = memory.codec_notes
    assert isinstance(notes, LastQueries)
    assert not notes.tensors()
    for _ in range(7):
        memory.attend(*TABLE.rows([1]))
    # The queries from the eleventh plain token on may choose.
    assert [len(tensor) for tensor in notes.tensors()] == [3, 3]


def test_a_layer_with_a_window_of_its_own_keeps_all_that_it_shows() -> None:
    memories = [new_memory(spec=spec, window=30) for spec in (SPEC, "dense")]
    outs = [TABLE.write(memory, ids_of(60), [20, 40]) for memory in memories]
    assert torch.equal(*outs)
    assert not memories[0].strands
    assert not memories[0].is_observed
    memories[0].attend(*TABLE.rows([1, 2, 3]))
    assert memories[0].rows_at_once(1, 3) == 3


def test_what_was_taken_back_has_no_say() -> None:
    past = ids_of(30)
    memory = new_memory(spec=SPEC)
    read_with_detours(memory, TABLE, past, 25)
    twin = new_memory(spec=SPEC)
    read_prompt(twin, past)
    for one, other in zip(evicted_of(memory).tensors(), evicted_of(twin).tensors(), strict=True):
        torch.testing.assert_close(one, other)


def test_queries_before_a_gap_are_not_taken_for_those_behind_it() -> None:
    # Twelve tokens are noted at once; back before the place from which on queries are noted, and forward one by one.
    past = ids_of(15)
    memory = new_memory(spec=SPEC)
    memory.attend(*TABLE.rows([*past[:4], *ids_of(8, seed=3)]))
    memory.commit()
    memory.truncate(4)
    for token in past[4:]:
        memory.attend(*TABLE.rows([token]))
        memory.commit()
    assert kept_of(TABLE, evicted_of(memory), past) == best_tokens(TABLE, past, WINDOW, 1, KEPT)


def test_sequences_of_a_batch_choose_for_themselves() -> None:
    memories = [new_memory(spec=SPEC) for _ in range(2)]
    pasts = [torch.randperm(64, generator=torch.Generator().manual_seed(s)).tolist()[:30] for s in (0, 1)]
    attend(memories, *TABLE.rows([*pasts[0], *pasts[1]]), Rows([(30, 0), (30, 0)]))
    for memory, past in zip(memories, pasts, strict=True):
        memory.commit()
        assert kept_of(TABLE, evicted_of(memory), past) == best_tokens(TABLE, past, WINDOW, 1, KEPT)


def test_forks_share_what_is_kept_and_go_on_alone() -> None:
    memory = new_memory(spec=SPEC)
    read_prompt(memory, ids_of(40))
    twin = memory.fork()
    assert evicted_of(twin) is evicted_of(memory)
    outs = [TABLE.write(one, ids_of(12, seed=1), range(1, 12)) for one in (memory, twin)]
    assert torch.equal(*outs)
    assert len(memory.strands) == 2


def test_one_cannot_go_back_into_what_was_dropped_and_nothing_is_lost() -> None:
    memory, other = (new_memory(spec=SPEC) for _ in range(2))
    for one in (memory, other):
        read_prompt(one, ids_of(40))
    message = (
        r"Cannot cut tokens 0 to 34 at 30: snapkv has dropped some of them\. "
        r"Go back to at least 35 or at most 0 tokens, or read the text again from there\."
    )
    past = Past([memory])
    for refused in (
        lambda: past.truncate(30),
        lambda: memory.pieces(30, 40),
        lambda: evicted_of(memory).split(30),
    ):
        with pytest.raises(ConfigError, match=message):
            refused()
    assert torch.equal(*(one.attend(*TABLE.rows([1])) for one in (memory, other)))
    memory.truncate(35)
    TABLE.write(memory, [1, 2])
    assert len(memory) == 37
    memory.truncate(0)
    assert not memory.strands
    assert_equal_to(read_prompt(memory, ids_of(40)), TABLE.answer([], ids_of(40)))


@pytest.mark.parametrize("materialise", [False, True], ids=["moved", "turned"])
def test_what_is_kept_moves_as_one(materialise: bool) -> None:
    past, before, new = ids_of(40), ids_of(9, seed=2), ids_of(4, seed=1)
    source, memory = new_memory(spec=SPEC), new_memory(spec=SPEC)
    read_prompt(source, past)
    kept = kept_of(TABLE, evicted_of(source), past)
    TABLE.write(memory, before)
    memory.splice(source, 0, 38, materialise=materialise)
    moved = evicted_of(memory)
    assert (moved.position, len(moved), moved.offset) == (9, 35, 0 if materialise else 9)
    wanted = answer(
        TABLE, [*before, *past[:38]], new, [[*range(9), *(9 + k for k in one)] for one in kept], 44
    )
    assert_equal_to(TABLE.write(memory, new, [1]), wanted)


def test_parallel_contexts_are_chosen_from_apart_from_what_stands_before_them() -> None:
    past, contexts, new = ids_of(6), [ids_of(30, seed=1), ids_of(20, seed=2), ids_of(7)], ids_of(3, seed=3)
    memory = new_memory(spec=SPEC)
    TABLE.write(memory, past)
    parts, kept = [], []
    for ids in contexts:
        reader = memory.fork()
        reader.set_apart()
        read_prompt(reader, ids)
        reader.freeze()
        parts.append(reader.pieces(6, len(reader)))
    assert [[len(strand) for strand in part] for part in parts] == [[25, 5], [15, 5], [7]]
    # One context is ordinary reading.
    first = parts[0][0]
    assert isinstance(first, EvictedStrand)
    assert isinstance(first.inner, FrozenStrand)
    keys = turned(TABLE.k[[*past, *contexts[0]]], range(36), GROUPED)
    for head in range(2):
        places = [
            (keys[:, head] - one.double()).abs().amax(-1).argmin().item() for one in first.inner.keys[head]
        ]
        assert min(places) >= 6
        kept.append([*range(6), *map(int, places)])
    alone = memory.fork()
    alone.append_strand(ParallelGroup(parts[:1]))
    assert_equal_to(TABLE.write(alone, new, [1]), answer(TABLE, [*past, *contexts[0]], new, kept, 31))
    memory.append_strand(ParallelGroup(parts))
    backwards = memory.fork()
    backwards.strands[-1] = ParallelGroup(parts[::-1])
    outs = [one.attend(*TABLE.rows([1])) for one in (memory, backwards)]
    assert_equal_to(outs[0], outs[1].double())


def test_a_policy_of_blocks_sees_what_is_kept_as_a_whole() -> None:
    past = ids_of(42)
    spec = "prflash:block=4,mode=bernoulli,p=floor,rate=1e-9,sink_blocks=0"
    memory = new_memory(spec=f"{spec},{SPEC}")
    TABLE.write(memory, past)
    kept = kept_of(TABLE, evicted_of(memory), past)
    # Of the tokens behind those a query sees its own block alone, which begins at 40.
    assert_equal_to(TABLE.write(memory, [1]), answer(TABLE, past, [1], kept, 40))


def dense_error(spec: str, tolerance: float, table: TokenTable) -> None:
    past, new = ids_of(60), ids_of(4, seed=1)
    plain, stacked = new_memory(spec=SPEC), new_memory(spec=f"{SPEC},{spec}")
    for memory in (plain, stacked):
        read_prompt(memory, past, table=table)
    wanted, found = (table.write(memory, new, [2]) for memory in (plain, stacked))
    assert_equal_to(found, wanted.double(), tolerance)


def test_codes_store_what_is_kept() -> None:
    spec = "gear:bits=8,group=7,buffer=7,backbone=kcvt,rank=0,rank_decode=0,sparsity=0"
    dense_error(spec, storage_bound(TABLE, 0, 4 / 255), TABLE)
    memory = new_memory(spec=f"{SPEC},gear:group=4,buffer=4,rank=2,rank_decode=2")
    read_prompt(memory, ids_of(60))
    strand = evicted_of(memory)
    assert isinstance(strand.inner, CodedStrand)
    # Of the 7 tokens to keep a whole group of 4.
    assert (len(strand), len(strand.inner)) == (55, 4)


def test_channels_are_chosen_from_the_kept_keys_by_the_same_queries() -> None:
    dead = TokenTable(GROUPED, dead=(3, 7))
    dense_error("think:ratio=0.25", 1e-5, dead)
    past = ids_of(60)
    memory, plain = (
        new_memory(spec=f"{SPEC},think:ratio=0.4,window=3,value_ratio=0.25"),
        new_memory(spec=SPEC),
    )
    for one in (memory, plain):
        read_prompt(one, past)
    thin, kept = evicted_of(memory).inner, evicted_of(plain).inner
    assert isinstance(thin, ThinStrand)
    assert isinstance(kept, FrozenStrand)
    queries = turned(TABLE.q[past], range(60), GROUPED)[-3:].square().sum(0).unflatten(0, (2, 2)).sum(1)
    scores = queries * kept.keys.double().square().sum(1)
    assert thin.key_channels.tolist() == scores.topk(4).indices.sort().values.tolist()
    assert thin.value_channels is not None
    assert thin.value_channels.shape == (2, 6)
    assert memory.nbytes() == plain.nbytes() - KEPT * 2 * (4 + 2) * 4 + 2 * (4 + 6) * 2 + 2 * 8 * 4


def test_three_codecs_are_one_with_one_text() -> None:
    text = "snapkv:capacity=100,kernel=1,think:ratio=0.5,gear:bits=8,group=4,buffer=8"
    codec = MemoryPlan.parse(text).codec
    assert codec == SnapKV(
        capacity=100, kernel=1, inner=ThinK(ratio=0.5, inner=GEAR(bits=8, group=4, buffer=8))
    )
    assert str(codec) == text
    assert SnapKV.from_json(codec.to_json()) == codec


@pytest.mark.parametrize("policy", ["window:size=9", "lm-infinite:local=9,initial=1", "infllm"])
def test_policies_that_need_places_are_refused(policy: str) -> None:
    name = policy.partition(":")[0]
    with pytest.raises(IncompatibleError, match=rf"(?s)Policy {name} .*codec snapkv"):
        MemoryPlan.parse(f"{policy},snapkv:capacity=100")


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("snapkv:capacity=32", ConfigError, "SnapKV.capacity must exceed window 32, .* Got 32"),
        ("snapkv:capacity=1", ConfigError, r"SnapKV.capacity must be a whole number in \[2, inf\)"),
        ("snapkv:window=0", ConfigError, r"SnapKV.window must be a whole number in \[1, inf\)"),
        ("snapkv:kernel=4", ConfigError, "SnapKV.kernel must be odd.* Got 4"),
        ("snapkv:kernel=0", ConfigError, r"SnapKV.kernel must be a whole number in \[1, inf\)"),
        ("snapkv:chunk=0", ConfigError, r"SnapKV.chunk must be a whole number in \[1, inf\)"),
        (
            "snapkv:capacity=90,gear:bits=4",
            ConfigError,
            "leaves 58 tokens beyond window 32, too few for codec gear. Raise capacity",
        ),
        ("snapkv,saq", IncompatibleError, "Codec snapkv cannot hold saq"),
        ("snapkv,snapkv", IncompatibleError, "Codec snapkv cannot hold snapkv"),
        ("think,snapkv", IncompatibleError, "Codec think cannot hold snapkv"),
        ("gear,snapkv", IncompatibleError, "Codec gear cannot be followed by snapkv"),
        ("snapkv,think:ratio=0.9", ConfigError, "ThinK.ratio must leave a channel of 8"),
    ],
)
def test_what_does_not_fit_is_named(spec: str, kind: type[ConfigError], message: str) -> None:
    with pytest.raises(kind, match=message):
        new_memory(spec=spec)


def test_numbers_that_codes_cannot_hold_leave_the_tokens_plain() -> None:
    heads = Heads(2, 1, 4, scale=0.5)
    memory = Memory(heads, MemoryPlan.parse(f"{SPEC},gear:group=4,buffer=4,rank=0,rank_decode=0"))
    q, k = torch.randn(20, 2, 4), torch.full((20, 1, 4), torch.nan)
    memory.attend(q, k, k)
    with pytest.raises(ConfigError, match="gear cannot store keys that are NaN"):
        memory.commit()
    assert (len(memory), len(memory.tail), memory.strands) == (20, 20, [])
