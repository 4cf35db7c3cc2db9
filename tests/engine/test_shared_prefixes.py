"""Requests with a common beginning: read once, stored once, visited once, and never across tenants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from plait.decode import Sampling
from plait.decode.speculate import SPECULATORS
from plait.engine import Engine, LanguageModel, Request, RunningSequence
from plait.memory import FrozenStrand, MemoryPlan
from plait.nn.mixers.linear_attention import LinearAttentionConfig
from plait.text import Tokenizer
from small_models import small_transformer

Make = Callable[..., LanguageModel]

COMMON = [(7 * i) % 250 + 1 for i in range(160)]
BUDGET = 2**24


def ask(prompt: list[int], **options: Any) -> Request:
    options.setdefault("max_new_tokens", 12)
    return Request(prompt=prompt, sampling=Sampling(temperature=0.0), ignore_end=True, **options)


def finish(engine: Engine, *requests: Request) -> list[RunningSequence]:
    sequences = [engine.submit(request) for request in requests]
    for _ in engine.run():
        engine.check_integrity()
    return sequences


def tokens_of(sequence: RunningSequence) -> tuple[int, ...]:
    return sequence.result().tokens


def alone(lm: LanguageModel, request: Request) -> tuple[int, ...]:
    return tokens_of(finish(lm.new_engine(share_prefixes=False), request)[0])


def rows_fed(lm: LanguageModel) -> list[int]:
    fed: list[int] = []
    lm.model.register_forward_pre_hook(lambda _, inputs: fed.append(len(inputs[1])))
    return fed


@pytest.fixture
def lm(make_small: Make) -> Any:
    lm = make_small()
    yield lm
    lm.model._forward_pre_hooks.clear()


def test_a_later_request_begins_with_what_an_earlier_one_has_read(lm: LanguageModel) -> None:
    engine = lm.new_engine(memory_bytes=BUDGET)
    finish(engine, ask([*COMMON, 3]))
    fed = rows_fed(lm)
    later = finish(engine, ask([*COMMON, 4, 5], max_new_tokens=3))[0]
    assert fed == [2, 1, 1]
    assert tokens_of(later) == alone(lm, ask([*COMMON, 4, 5], max_new_tokens=3))
    assert later.result().shared_tokens == 160
    metrics = engine.metrics
    assert (metrics.starts, metrics.hits, metrics.shared_tokens) == (2, 1, 160)


def test_the_next_turn_of_a_conversation_begins_with_the_last_answer(lm: LanguageModel) -> None:
    engine = lm.new_engine(memory_bytes=BUDGET)
    answer = tokens_of(finish(engine, ask(COMMON, max_new_tokens=40))[0])
    turn = ask([*COMMON, *answer, 9, 9, 9])
    second = finish(engine, turn)[0]
    # 160 + 39 tokens were computed, the last chosen one was not; 192 are whole runs of 32.
    assert second.shared_tokens == 192
    assert tokens_of(second) == alone(lm, turn)


def test_the_last_token_of_a_prompt_is_always_read_again(lm: LanguageModel) -> None:
    engine = lm.new_engine(memory_bytes=BUDGET)
    first, second = (finish(engine, ask(COMMON))[0] for _ in range(2))
    assert tokens_of(first) == tokens_of(second)
    assert second.shared_tokens == 128


def test_requests_that_come_together_read_their_beginning_once(lm: LanguageModel) -> None:
    requests = [ask([*COMMON, 100 + i, 5, i + 1], max_new_tokens=2) for i in range(6)]
    wanted = [alone(lm, request) for request in requests]
    fed = rows_fed(lm)
    engine = lm.new_engine(rows_per_step=100)
    assert [tokens_of(each) for each in finish(engine, *requests)] == wanted
    # The first reads its prompt in two steps; then the others read the three tokens of their own.
    assert fed == [100, 63, 1 + 5 * 3, 5]
    assert engine.metrics.memory_bytes == 0


def test_nobody_waits_for_a_beginning_that_is_not_his(lm: LanguageModel) -> None:
    fed = rows_fed(lm)
    engine = lm.new_engine()
    finish(engine, ask([1, *COMMON], max_new_tokens=1), ask([2, *COMMON], max_new_tokens=1))
    assert fed == [322]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_tree_of_beginnings_answers_as_each_alone(make_small: Make, temperature: float) -> None:
    lm = make_small(draft="prompt-lookup:match=2,tokens=4,patience=0")
    sampling = Sampling(temperature=temperature, seed=5)
    prompts = [
        [*COMMON[:cut], *own]
        for cut, own in [(160, [1]), (160, [1, 2]), (96, [8] * 50), (96, [8] * 40 + [9]), (33, [7]), (0, [5])]
    ]
    requests = [
        Request(prompt=prompt, sampling=sampling, max_new_tokens=20, ignore_end=True) for prompt in prompts
    ]
    wanted = [alone(lm, request) for request in requests]
    for options in ({}, {"memory_bytes": BUDGET}, {"rows_per_step": 40, "max_sequences": 3}):
        engine = lm.new_engine(**options)
        assert [tokens_of(each) for each in finish(engine, *requests)] == wanted
        assert engine.metrics.hits >= 3
        assert [tokens_of(each) for each in finish(engine, *reversed(requests))] == wanted[::-1]


def test_a_shared_strand_is_visited_once_for_all_sequences(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = lm.new_engine()
    sequences = [engine.submit(ask([*COMMON, i + 1])) for i in range(5)]
    while any(sequence.is_reading for sequence in sequences):
        engine.step()
    visits: list[tuple[int, int]] = []
    attend = FrozenStrand.attend

    def counted(strand: FrozenStrand, q: torch.Tensor, *arguments: Any) -> Any:
        visits.append((len(strand), len(q)))
        return attend(strand, q, *arguments)

    monkeypatch.setattr(FrozenStrand, "attend", counted)
    engine.step()
    assert visits.count((160, 5)) == 2  # once in each of the two layers
    assert all(length < 160 for length, rows in visits if rows == 1)


def test_the_bytes_of_a_common_beginning_are_kept_once(lm: LanguageModel) -> None:
    used = {}
    for shares in (True, False):
        engine = lm.new_engine(memory_bytes=BUDGET, share_prefixes=shares)
        sequences = [engine.submit(ask([*COMMON, i + 1])) for i in range(8)]
        while any(sequence.is_reading for sequence in sequences):
            engine.step()
        engine.check_integrity()
        used[shares] = engine.metrics
    row = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, bytes
    assert used[False].prefix_bytes == 0
    assert used[False].memory_bytes >= 8 * 161 * row
    # Each has its own token or two in storage for 32.
    assert used[True].prefix_bytes == 160 * row
    assert used[True].memory_bytes <= (160 + 8 * 32) * row


def test_other_tenants_get_nothing_and_the_same_tenant_does(lm: LanguageModel) -> None:
    engine = lm.new_engine(memory_bytes=BUDGET)
    finish(engine, ask([*COMMON, 1], tenant="anna"))
    fed = rows_fed(lm)
    stranger = finish(engine, ask([*COMMON, 2], tenant="bert", max_new_tokens=1))[0]
    friend = finish(engine, ask([*COMMON, 2], tenant="anna", max_new_tokens=1))[0]
    assert (stranger.shared_tokens, friend.shared_tokens) == (0, 160)
    assert fed == [161, 1]


def test_tenants_that_come_together_share_nothing(lm: LanguageModel) -> None:
    engine = lm.new_engine(memory_bytes=BUDGET)
    anna, bert = (engine.submit(ask([*COMMON, 1], tenant=name)) for name in ("anna", "bert"))
    engine.step()
    assert (anna.held, bert.held) == (161, 161)
    assert anna.past is not None
    assert bert.past is not None
    mine, theirs = (
        {tensor.data_ptr() for layer in past.layers for strand in layer.held() for tensor in strand.tensors()}  # type: ignore[union-attr]
        for past in (anna.past, bert.past)
    )
    assert not mine & theirs
    for _ in engine.run():
        pass
    assert tokens_of(anna) == tokens_of(bert)


@pytest.mark.parametrize("memory", ["full", "dense:dtype=bf16", "window:size=40,sinks=2"])
def test_memories_that_cannot_be_shared_take_no_part(make_small: Make, memory: str) -> None:
    lm = make_small(memory)
    engine = lm.new_engine(memory_bytes=BUDGET)
    requests = [ask([*COMMON, 1]), ask([*COMMON, 2])]
    assert [tokens_of(each) for each in finish(engine, *requests)] == [alone(lm, each) for each in requests]
    assert (engine.metrics.hits > 0) == MemoryPlan.parse(memory).is_shareable == ("window" not in memory)


def test_recurrent_models_take_no_part(byte_tokenizer: Tokenizer) -> None:
    mixer = LinearAttentionConfig(num_heads=2, head_dim=16)
    model = small_transformer(mixer, mixer, seed=1, vocab_size=257, width=32, inner=32, max_positions=256)
    plan, none = MemoryPlan(), SPECULATORS.parse("none")
    engine = Engine(model, byte_tokenizer, plan, new_speculator=none.build, memory_bytes=BUDGET)
    first, second = finish(engine, ask([*COMMON, 1]), ask([*COMMON, 1]))
    assert tokens_of(first) == tokens_of(second)
    assert engine.metrics.hits == 0
    assert engine.metrics.memory_bytes == 0


def test_a_callers_own_past_is_neither_shared_nor_dropped(lm: LanguageModel) -> None:
    engine = lm.new_engine(memory_bytes=BUDGET)
    past = lm.model.new_past(lm.plan)
    sequence = engine.submit(ask([*COMMON, 1]), past)
    for _ in engine.run():
        engine.check_integrity()
    assert len(past) == 161 + 11
    assert sequence.past is past
    assert engine.metrics.memory_bytes == 0
    assert finish(engine, ask([*COMMON, 1]))[0].shared_tokens == 0


def test_a_cancelled_request_frees_what_only_it_remembered(lm: LanguageModel) -> None:
    engine = lm.new_engine(memory_bytes=BUDGET)
    first, second = engine.submit(ask([*COMMON, 1])), engine.submit(ask([*COMMON, 2, 2]))
    for _ in range(4):
        engine.step()
    both = engine.metrics.memory_bytes
    own = engine._budget.own(second)
    assert own > 0
    engine.cancel(second)
    engine.check_integrity()
    assert engine.metrics.memory_bytes == both - own
    for _ in engine.run():
        pass
    assert tokens_of(first) == alone(lm, ask([*COMMON, 1]))
