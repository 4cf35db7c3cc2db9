"""InfLLM finds the blocks that a plain reading of the algorithm finds, and remembers every token once."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_methods import at_most, both, first_and_last
from memory_oracle import (
    GROUPED,
    LAYERS,
    TokenTable,
    assert_equal_to,
    biases,
    frequencies,
    ids_of,
    new_memory,
    refusal,
    turned,
    within,
)
from torch import Tensor

from plait.errors import CapacityError, ConfigError, IncompatibleError
from plait.memory import Heads, Memory, MemoryPlan, Strand, Tree
from plait.memory.policies import InfLLM
from plait.memory.policies import window as window_policy
from plait.memory.policies.infllm import _Blocks
from plait.ops import Rope

TABLE = TokenTable(GROUPED)
EXAMPLES = settings(deadline=None, max_examples=15, derandomize=True)


class Reference:
    """The algorithm on a list of ids, one run of queries after the other, in float64."""

    def __init__(self, table: TokenTable, policy: InfLLM, ids: Sequence[int]) -> None:
        self.table, self.policy, self.ids = table, policy, list(ids)
        self.mass = torch.zeros(table.heads.num_heads, len(ids), dtype=torch.float64)
        self.index: list[Tensor] = []
        self.chosen: list[int] = []

    def keys(self, positions: Sequence[int]) -> Tensor:
        """Unrotated keys (T, H, D), repeated for query heads."""
        heads = self.table.heads
        rows = self.table.k[[self.ids[position] for position in positions]].double()
        return rows.repeat_interleave(heads.num_heads // heads.num_kv_heads, dim=1)

    def run(self, start: int, stop: int) -> Tensor:
        """Outputs (Q, H, V) of the queries at positions [start, stop)."""
        policy, heads = self.policy, self.table.heads
        behind = max(start - policy.local, 0)
        num_blocks = max(behind - policy.initial, 0) // policy.block
        blocks = [
            range(policy.initial + number * policy.block, policy.initial + (number + 1) * policy.block)
            for number in range(num_blocks)
        ]
        for block in blocks[len(self.index) :]:
            mass = self.mass[:, block.start : block.stop]
            best = mass.topk(policy.representatives, dim=1).indices
            keys = self.keys(block).transpose(0, 1)
            self.index.append(torch.stack([keys[h, best[h]].mean(dim=0) for h in range(heads.num_heads)]))
        q = self.table.q[[self.ids[position] for position in range(start, stop)]]
        mean = turned(q, [policy.local - 1] * len(q), heads).mean(dim=0)
        scores = torch.tensor([float((mean * vector).sum()) for vector in self.index])
        count = min(policy.topk, num_blocks)
        self.chosen = sorted(scores.topk(count).indices.tolist()) if count else []
        lost = {j for number, block in enumerate(blocks) if number not in self.chosen for j in block}
        k = self.keys(range(stop))
        group = heads.num_heads // heads.num_kv_heads
        v = self.table.v[self.ids[:stop]].double().repeat_interleave(group, dim=1)
        outs = []
        for i in range(start, stop):
            distances = [min(abs(i - j), policy.local - 1) for j in range(stop)]
            own = turned(q[[i - start]].expand(stop, -1, -1), distances, heads)
            s = (own * k).sum(dim=-1) * heads.scale
            if heads.softcap is not None:
                s = heads.softcap * torch.tanh(s / heads.softcap)
            s = s + biases(heads, [distances])[:, 0].T
            hidden = torch.tensor([j > i or j in lost for j in range(stop)])
            p = s.masked_fill(hidden[:, None], -math.inf).softmax(dim=0)
            outs.append(torch.einsum("th,thv->hv", p, v))
            near = max(i - policy.local + 1, 0)
            self.mass[:, near : i + 1] += p[near : i + 1].T
        return torch.stack(outs)


def aligned(bounds: Sequence[int], execution: int) -> list[int]:
    """Ends of runs when chunks with these bounds are cut at multiples of `execution`."""
    return sorted({*bounds, *range(0, bounds[-1], execution)})


def notes_of(memory: Memory) -> _Blocks:
    assert isinstance(memory.policy_notes, _Blocks)
    return memory.policy_notes


@EXAMPLES
@given(
    layer=st.sampled_from(sorted(LAYERS)),
    local=st.integers(2, 12),
    initial=st.integers(0, 6),
    block=st.integers(1, 6),
    topk=st.integers(0, 3),
    representatives=st.integers(1, 3),
    execution=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 63), max_size=10),
    slack=st.integers(1, 9),
    is_file=st.booleans(),
    forks=st.booleans(),
    pends=st.booleans(),
)
def test_equals_the_algorithm_run_by_run(
    layer: str,
    local: int,
    initial: int,
    block: int,
    topk: int,
    representatives: int,
    execution: int,
    cuts: list[int],
    slack: int,
    is_file: bool,
    forks: bool,
    pends: bool,
) -> None:
    # No token occurs twice, so that no two blocks match equally well.
    ids = torch.randperm(TokenTable.SIZE, generator=torch.Generator().manual_seed(local)).tolist()
    table, length = TokenTable(LAYERS[layer]), len(ids)
    policy = InfLLM(
        local=local,
        initial=initial,
        block=min(block, local),
        topk=topk,
        representatives=min(representatives, block, local),
        execution=min(execution, local),
        cached=max(topk, 1),
        cold="file" if is_file else "memory",
    )
    memory = Memory(table.heads, MemoryPlan(policy=policy))
    bounds = [0, *sorted(set(cuts)), length]
    reference, wanted = Reference(table, policy, ids), []
    for low, high in pairwise(aligned(bounds, policy.execution)):
        wanted.append(reference.run(low, high))
    outs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_policy, "_SLACK", slack)
        for low, high in pairwise(bounds):
            outs.append(memory.attend(*table.rows(ids[low:high])))
            chosen = notes_of(memory).chosen
            if not pends:
                memory.commit()
            if forks and not pends:
                memory = memory.fork()
    assert_equal_to(torch.cat(outs), torch.cat(wanted))
    assert chosen == reference.chosen


@pytest.mark.parametrize("topk", [0, 2])
def test_chunks_of_whole_runs_agree(topk: int) -> None:
    ids = ids_of(192)
    outs = []
    for chunk in (8, 16, 64, 192):
        memory = new_memory(spec=f"infllm:local=20,initial=4,block=4,topk={topk},execution=8")
        outs.append(TABLE.write(memory, ids, range(chunk, 192, chunk)))
    for out in outs[1:]:
        assert_equal_to(out, outs[0].double())


def test_without_blocks_it_is_lm_infinite_one_position_nearer() -> None:
    """Blocks of one token leave no remainder, so that what is seen is the first tokens and the window."""
    ids = ids_of(90)
    memory = new_memory(spec="infllm:local=9,initial=4,block=1,topk=0,representatives=1,execution=1")
    given_ = TABLE.write(memory, ids, range(1, 90))
    # A first token joins the others a step after it left the window; until then it is the remainder.
    wanted = TABLE.answer([], ids, sees=first_and_last(9, 4), distance=at_most(8))
    nearly = TABLE.answer([], ids, sees=first_and_last(10, 4), distance=at_most(8))
    assert_equal_to(given_[:13], wanted[:13])
    assert_equal_to(given_, nearly)


def test_a_sequence_within_the_window_is_seen_as_by_full_attention() -> None:
    ids = ids_of(200)
    memory = new_memory(spec="infllm:local=200,initial=8,block=16,topk=1,execution=64")
    assert_equal_to(TABLE.write(memory, ids, [77, 78]), TABLE.answer([], ids))
    assert notes_of(memory).blocks == []


@EXAMPLES
@given(
    steps=st.lists(st.tuples(st.integers(1, 15), st.integers(0, 6)), min_size=1, max_size=12),
    slack=st.integers(1, 9),
)
def test_every_token_is_in_one_place(steps: list[tuple[int, int]], slack: int) -> None:
    memory = new_memory(spec="infllm:local=10,initial=3,block=4,topk=1,execution=5,representatives=2")
    policy = memory.plan.policy
    assert isinstance(policy, InfLLM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_policy, "_SLACK", slack)
        for length, back in steps:
            TABLE.write(memory, ids_of(length))
            refusal(memory, max(len(memory) - back, 0))
            notes, total = notes_of(memory), len(memory)
            first = 0 if notes.first is None else len(notes.first)
            ends = [first, *(end for b in notes.blocks for end in (b.start, b.start + policy.block))]
            assert first == min(max(total - 10, 0), 3)
            assert len(notes.blocks) == notes.index.length == max(total - 13, 0) // 4
            # First tokens, blocks and what the window and the remainder hold follow each other.
            assert ends[1::2] == ends[:-1:2] if notes.blocks else True
            assert policy.start_of_rest(total) == ends[-1]
            held = memory.all_strands()
            assert held == [] or held[0].position <= ends[-1]
            assert [s.position for s in held[1:]] == [s.position + len(s) for s in held[:-1]]


def test_where_blocks_are_changes_no_bit() -> None:
    ids = ids_of(300)
    outs = []
    for place in ("cached=3,cold=memory", "cached=3,cold=file", "cached=40,cold=file"):
        spec = f"infllm:local=24,initial=4,block=8,topk=3,execution=8,{place}"
        outs.append(TABLE.write(new_memory(spec=spec), ids, range(1, 300)))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_file_keeps_memory_flat_and_holds_every_block() -> None:
    memory = new_memory(spec="infllm:local=64,initial=4,block=16,topk=2,cached=4,execution=64,cold=file")
    ids = ids_of(64)
    sizes = []
    for _ in range(60):
        TABLE.write(memory, ids)
        sizes.append(memory.nbytes())
    assert max(sizes[20:]) <= 1.1 * max(sizes[10:20])
    assert len(notes_of(memory).resident) <= 4
    token = 2 * GROUPED.num_kv_heads * GROUPED.head_dim * 4
    assert notes_of(memory).cold_nbytes == len(notes_of(memory).blocks) * 16 * token
    inside = new_memory(spec="infllm:local=64,initial=4,block=16,topk=2,cached=4,execution=64")
    TABLE.write(inside, ids * 60)
    assert inside.nbytes() >= 60 * 64 * token > 5 * sizes[-1]


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 6])
def test_a_full_disk_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    memory = new_memory(spec="infllm:local=8,initial=0,block=4,topk=1,execution=8,cold=file")

    write, left = os.pwrite, writes

    def full(*given: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*given)

    ids, new = ids_of(40), ids_of(12, seed=1)
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", full)
        with pytest.raises(
            CapacityError, match="No room on disk for remembered tokens: No space left on device"
        ):
            TABLE.write(memory, ids, [8, 16])
    # Once there is room, everything goes on from what was read.
    done = len(memory) - memory.pending
    memory.truncate(done)
    wanted = new_memory(spec=str(memory.plan))
    TABLE.write(wanted, ids, [8, 16])
    TABLE.write(memory, ids[done:], [at - done for at in (8, 16) if at > done])
    given, exact = (TABLE.write(one, new) for one in (memory, wanted))
    assert len(notes_of(memory).blocks) == notes_of(memory).index.length > 4
    assert_equal_to(given, exact)


def test_coded_blocks_go_to_the_file_too() -> None:
    gear = "gear:bits=4,group=4,buffer=4,rank=2,rank_decode=2,sparsity=0.1"
    spec = "infllm:local=16,initial=0,block=8,topk=2,cached=2,execution=16"
    ids = ids_of(64) * 5
    inside, outside = (new_memory(spec=f"{spec}{place},{gear}") for place in ("", ",cold=file"))
    answers = [TABLE.write(memory, ids) for memory in (inside, outside)]
    assert torch.equal(*answers)
    stored = sum(block.nbytes() for block in notes_of(inside).blocks if isinstance(block, Strand))
    # Tensors begin at multiples of 64 bytes, and behind those of each block stands what describes them to native code.
    described = 1024 * len(notes_of(outside).blocks)
    assert stored <= notes_of(outside).cold_nbytes <= 1.5 * stored + described
    assert notes_of(inside).cold_nbytes == 0
    assert outside.nbytes() <= inside.nbytes() - 0.8 * stored


@pytest.mark.parametrize("is_file", [False, True])
def test_going_back_is_exact_or_refused(is_file: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_policy, "_SLACK", 6)
    place = "cold=file" if is_file else "cold=memory"
    spec = f"infllm:local=8,initial=3,block=4,topk=99,cached=99,execution=5,{place}"
    ids, new = ids_of(50), ids_of(20, seed=1)
    refused = []
    for back_to in range(51):
        memory = new_memory(spec=spec)
        TABLE.write(memory, ids, range(1, 50))
        message = refusal(memory, back_to)
        if message is not None:
            assert f"Cannot go back to {back_to} tokens: infllm:local=8" in message
            earliest = int(message.split("at least ")[1].split(",")[0])
            assert earliest > back_to
            refused.append((back_to, earliest))
        kept = ids[:back_to] if message is None else ids
        assert_equal_to(TABLE.write(memory, new, [1]), TABLE.answer(kept, new, distance=at_most(7)))
    assert [back for back, _ in refused] == list(range(1, refused[0][1]))
    assert refused[-1][0] < 44


def test_rejected_drafts_leave_no_trace() -> None:
    """What a draft's nodes attended to counts only for those that were kept."""
    spec = "infllm:local=12,initial=2,block=4,topk=99,cached=99,execution=1,representatives=1"
    ids = ids_of(60)
    plain, drafted = new_memory(spec=spec), new_memory(spec=spec)
    TABLE.write(plain, ids, range(1, 60))
    for position in range(0, 60, 2):
        pair = ids[position : position + 2]
        wrong = ids_of(4, seed=position)
        drafted.attend(*TABLE.rows([pair[0], wrong[0], pair[1], *wrong[1:]]), mask=Tree([-1, 0, 0, 1, 2, 2]))
        drafted.commit([0, 2])
    ours, theirs = notes_of(drafted), notes_of(plain)
    start = max(ours.mass.start, theirs.mass.start)
    torch.testing.assert_close(ours.mass.of(start, 60 - start), theirs.mass.of(start, 60 - start))
    torch.testing.assert_close(ours.index.numbers, theirs.index.numbers)


def test_a_narrow_layer_keeps_its_window_and_no_blocks() -> None:
    memory = new_memory(spec="infllm:local=20,initial=4,block=4,topk=2,execution=20", window=9)
    ids = ids_of(2000)
    given_ = TABLE.write(memory, ids, range(100, 2000, 100))
    assert_equal_to(given_[-40:], TABLE.answer(ids[:-40], ids[-40:], sees=within(9)))
    assert notes_of(memory).tensors()[0].numel() == 0
    assert sum(map(len, memory.all_strands())) <= 9 + 2 * 256 + 100


def test_a_wider_layer_sees_blocks_within_its_window() -> None:
    ids = ids_of(80)
    memory = new_memory(spec="infllm:local=8,initial=3,block=4,topk=99,cached=99,execution=5", window=30)
    wanted = TABLE.answer([], ids, sees=both(within(30), within(None)), distance=at_most(7))
    assert_equal_to(TABLE.write(memory, ids, [13, 40, 41]), wanted)


def test_it_says_which_blocks_were_seen() -> None:
    memory = new_memory(spec="infllm:local=8,initial=2,block=4,topk=2,execution=8")
    TABLE.write(memory, ids_of(64), range(8, 64, 8))
    retrieved = notes_of(memory).retrieved
    assert len(retrieved) == 2
    assert all(len(block) == 4 and block.start % 4 == 2 and block.stop <= 56 - 8 for block in retrieved)


def test_a_model_whose_speeds_depend_on_the_length_is_refused() -> None:
    rope = Rope(frequencies(8), rule=lambda length: (frequencies(8), 1.0))
    with pytest.raises(IncompatibleError, match="infllm limits distances, but this model"):
        Memory(Heads(2, 1, 8, scale=1.0, rope=rope), MemoryPlan.parse("infllm"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("infllm:local=64,execution=65,block=8", "InfLLM.execution must be at most local 64. Got 65"),
        ("infllm:local=64,execution=64", "InfLLM.block must be at most local 64. Got 128"),
        ("infllm:representatives=129", "InfLLM.representatives must be at most block 128. Got 129"),
        ("infllm:topk=40", "InfLLM.cached must be at least topk 40. Got 32"),
        ("infllm:topk=-1", r"InfLLM.topk must be a whole number in \[0, inf\). Got"),
        ("infllm:initial=-1", r"InfLLM.initial must be a whole number in \[0, inf\). Got"),
        ("infllm:cold=disk", "InfLLM.cold must be memory or file. Got 'disk'"),
    ],
)
def test_bad_settings_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryPlan.parse(spec)
