"""The engine: batching, prefill, speculation, cancellation, failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.decode import Sampling
from plait.decode.speculate import Context, Speculator, Tree
from plait.engine import Engine, LanguageModel, Request
from plait.errors import CapacityError, ConfigError, PlaitError
from plait.memory import MemoryPlan, Rows

Make = Callable[..., LanguageModel]

PROMPTS = [[5, 6, 7], list(range(1, 80)), [9], [3, 1, 4, 1, 5, 9, 2, 6] * 5]
MEMORIES = ["full", "dense:dtype=bf16", "window:size=40,sinks=2", "lm-infinite:local=40,initial=2"]
# Drafts that are not drawn at random, with which seeded answers are those of plain decoding.
DRAFTS = [
    "none",
    "prompt-lookup",
    "prompt-lookup:match=2,tokens=16,patience=0",
    "token-recycling:k=3,nodes=80",
    "token-recycling:budget=auto",
    "mix:prompt-lookup:match=2+token-recycling:nodes=20+budget=9",
]


def greedy_by_hand(lm: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """Plain greedy decoding without memory: the whole text again for every token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            hidden = lm.model(torch.tensor(ids), Rows([(len(ids), 0)]))
            ids.append(int(lm.model.logits(hidden[-1:]).argmax()))
    return ids[len(prompt) :]


def run(engine: Engine, *requests: Request) -> list[list[int]]:
    sequences = [engine.submit(request) for request in requests]
    for _ in engine.run():
        pass
    return [list(sequence.result().tokens) for sequence in sequences]


def request(prompt: list[int], **options: Any) -> Request:
    options.setdefault("max_new_tokens", 24)
    options.setdefault("ignore_end", True)
    return Request(prompt=prompt, sampling=options.pop("sampling", Sampling(temperature=0.0)), **options)


def test_greedy_tokens_equal_decoding_without_memory(make_small: Make) -> None:
    lm = make_small()
    for prompt in PROMPTS:
        assert run(lm.new_engine(), request(prompt))[0] == greedy_by_hand(lm, prompt, 24)


@pytest.mark.parametrize("rows_per_step", [1, 7, 64, 512])
def test_prompt_chunks_do_not_change_the_answer(make_small: Make, rows_per_step: int) -> None:
    lm = make_small()
    for prompt in PROMPTS:
        answer = run(lm.new_engine(rows_per_step=rows_per_step), request(prompt))[0]
        assert answer == greedy_by_hand(lm, prompt, 24)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_answers_as_each_request_alone(
    make_small: Make, memory: str, draft: str, temperature: float
) -> None:
    lm = make_small(memory, draft)
    plain = make_small(memory)
    sampling = Sampling(temperature=temperature, seed=11, repetition_penalty=1.1)
    requests = [request(prompt, sampling=sampling) for prompt in PROMPTS]
    alone = [run(plain.new_engine(), each)[0] for each in requests]
    assert run(lm.new_engine(), *requests) == alone
    assert run(lm.new_engine(max_sequences=2, rows_per_step=16), *requests) == alone


@pytest.mark.parametrize(
    "memory",
    [
        "gear:bits=2,group=16,buffer=16,sparsity=0.1",
        "saq:steps=16@16/16@8/rest@3,group=16,sink=16@8",
        "think:ratio=0.4,recent=8,window=8,chunk=16,gear:bits=4,group=16,buffer=16",
    ],
)
def test_lossy_codecs_store_a_prompt_at_its_end_however_it_was_read(make_small: Make, memory: str) -> None:
    lm = make_small(memory)
    requests = [request(prompt, max_new_tokens=40) for prompt in PROMPTS]
    alone = [run(lm.new_engine(), each)[0] for each in requests]
    for rows_per_step in (5, 33, 512):
        assert run(lm.new_engine(rows_per_step=rows_per_step), *requests) == alone
    # The codes are coarse enough to be noticed, so the answers above did come from them.
    assert alone != [run(make_small().new_engine(), each)[0] for each in requests]


# The small model has two blocks: a draft of one is often wrong, a draft of both never.
DRAWN = [
    f"{draft},layers={layers}"
    for draft in ("chain:tokens=3", "rsd-c:branch=[2,2,1]", "rsd-s:width=3,depth=3")
    for layers in (1, 2)
]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("draft", DRAWN)
def test_draft_models_never_change_greedy_answers(make_small: Make, memory: str, draft: str) -> None:
    lm = make_small(memory, draft)
    requests = [request(prompt) for prompt in PROMPTS]
    alone = [run(make_small(memory).new_engine(), each)[0] for each in requests]
    assert run(lm.new_engine(), *requests) == alone
    assert run(lm.new_engine(max_sequences=2, rows_per_step=16), *requests) == alone


@pytest.mark.parametrize("draft", DRAWN)
def test_a_draft_that_is_the_model_is_always_accepted(make_small: Make, draft: str) -> None:
    engine = make_small(draft=draft).new_engine()
    sequence = engine.submit(request(PROMPTS[0], sampling=Sampling(seed=1), max_new_tokens=25))
    longest = max(len(piece.choices) for _, piece in engine.run())
    assert len(sequence.result().tokens) == 25
    assert longest == 4 or "layers=1" in draft


@pytest.mark.parametrize("draft", [*DRAFTS[1:], *DRAWN[::2]])
def test_drafts_stop_at_the_end_of_the_context(make_small: Make, draft: str) -> None:
    engine = make_small(draft=draft).new_engine()
    sequence = engine.submit(request([1, 2] * 252, max_new_tokens=100))
    positions = []
    hook = engine.model.register_forward_pre_hook(
        lambda _, inputs: positions.append(int(inputs[1].positions.max()))
    )
    for _ in engine.run():
        pass
    hook.remove()
    assert len(sequence.tokens) == 512
    assert max(positions) == 510


class _Guess(Speculator):
    """Proposes a branching tree: mostly rubbish, with the true continuation on one branch when told."""

    def __init__(self, truth: list[int]) -> None:
        self.truth = truth
        self.accepted = 0

    def propose(self, context: Context) -> Tree:
        if context.budget < 5:
            return Tree.root(context.tokens[-1])
        at = len(context.tokens)
        good = self.truth[at : at + 2]
        wrong = [(token + 1) % 257 for token in good]
        if len(good) < 2:
            return Tree.root(context.tokens[-1])
        #        root -> wrong0, good0 ; good0 -> wrong1, good1 ; wrong0 -> good1
        return Tree([context.tokens[-1], wrong[0], good[0], wrong[1], good[1], good[1]], [-1, 0, 0, 2, 2, 1])

    def observe(self, tokens: Any, tree: Tree, path: Any, logits: Any) -> None:
        self.accepted += len(path) - 1


@pytest.mark.parametrize("memory", MEMORIES)
def test_branching_drafts_are_accepted_and_change_nothing(make_small: Make, memory: str) -> None:
    lm = make_small(memory)
    prompt = PROMPTS[3]
    plain = run(lm.new_engine(), request(prompt, max_new_tokens=60))[0]
    guess = _Guess(prompt + plain)
    engine = Engine(lm.model, lm.tokenizer, lm.plan, new_speculator=lambda: guess)
    assert run(engine, request(prompt, max_new_tokens=60))[0] == plain
    assert guess.accepted >= 30


def test_memory_after_drafts_is_that_of_plain_decoding(make_small: Make) -> None:
    pasts = []
    for draft in ("none", "prompt-lookup:match=2,tokens=8,patience=0"):
        lm = make_small(draft=draft)
        past = lm.model.new_past(lm.plan)
        engine = lm.new_engine()
        engine.submit(request(PROMPTS[3], max_new_tokens=40), past)
        for _ in engine.run():
            pass
        pasts.append(past)
    assert len(pasts[0]) == len(pasts[1])
    for plain, drafted in zip(pasts[0].layers, pasts[1].layers, strict=True):
        torch.testing.assert_close(plain.tail.keys, drafted.tail.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(plain.tail.values, drafted.tail.values, atol=1e-5, rtol=0)


def test_drafts_outside_the_vocabulary_are_refused(make_small: Make) -> None:
    class Bad(Speculator):
        def propose(self, context: Context) -> Tree:
            return Tree.chain([context.tokens[-1], 999])

    lm = make_small()
    engine = Engine(lm.model, lm.tokenizer, lm.plan, new_speculator=Bad)
    engine.submit(request([1, 2]))
    with pytest.raises(ConfigError, match="999"):
        list(engine.run())


def test_cancelling_one_leaves_the_others(make_small: Make) -> None:
    lm = make_small()
    engine = lm.new_engine()
    first, second = engine.submit(request(PROMPTS[0])), engine.submit(request(PROMPTS[1]))
    for _ in range(5):
        engine.step()
    piece = engine.cancel(first)
    assert piece.finish_reason == "cancelled"
    for _ in engine.run():
        pass
    assert first.result().finish_reason == "cancelled"
    assert list(first.result().tokens) == greedy_by_hand(lm, PROMPTS[0], len(first.result().tokens))
    assert list(second.result().tokens) == greedy_by_hand(lm, PROMPTS[1], 24)


def test_a_failing_sequence_does_not_stop_the_others(make_small: Make, monkeypatch: Any) -> None:
    lm = make_small()
    engine = lm.new_engine()
    good = engine.submit(request(PROMPTS[0]))
    bad = engine.submit(request(PROMPTS[2]))

    def broken(*_: Any) -> Any:
        raise PlaitError("numbers are broken")

    monkeypatch.setattr(bad.sampler, "choose", broken)
    with pytest.raises(PlaitError, match="broken"):
        list(engine.run())
    for _ in engine.run():
        pass
    assert bad.result().finish_reason == "cancelled"
    assert list(good.result().tokens) == greedy_by_hand(lm, PROMPTS[0], 24)


def test_an_interrupted_forward_pass_can_be_repeated(make_small: Make, monkeypatch: Any) -> None:
    lm = make_small()
    engine = lm.new_engine()
    sequence = engine.submit(request(PROMPTS[1]))
    for _ in range(3):
        engine.step()
    second_block = lm.model.blocks[1]
    original = second_block.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(second_block, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(second_block, "forward", original)
    for _ in engine.run():
        pass
    assert list(sequence.result().tokens) == greedy_by_hand(lm, PROMPTS[1], 24)


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(make_small: Make) -> None:
    engine = make_small().new_engine()
    with pytest.raises(CapacityError, match=r"600 tokens.*512"):
        engine.submit(request([1] * 600))
    with pytest.raises(CapacityError):
        engine.submit(request([1] * 512))


def test_generation_ends_at_the_context_with_length(make_small: Make) -> None:
    engine = make_small().new_engine()
    sequence = engine.submit(request([1] * 505, max_new_tokens=100))
    for _ in engine.run():
        pass
    assert sequence.result().finish_reason == "length"
    assert len(sequence.tokens) == 512


@pytest.mark.parametrize("draft", ["none", "prompt-lookup"])
def test_a_policy_that_limits_distances_reads_and_writes_past_the_context(
    make_small: Make, draft: str
) -> None:
    lm = make_small("lm-infinite:local=64,initial=4", draft)
    engine = lm.new_engine(rows_per_step=100)
    prompt = [token % 50 + 100 for token in range(900)]
    first, second = (engine.submit(request(ids, max_new_tokens=30)) for ids in (prompt, prompt[:505]))
    for _ in engine.run():
        pass
    assert first.result().finish_reason == second.result().finish_reason == "length"
    assert (len(first.tokens), len(second.tokens)) == (930, 535)
    past = lm.model.new_past(lm.plan)
    tokens = list(prompt)
    for _ in range(30):
        fed = torch.tensor(tokens[len(past) :])
        hidden = lm.model(fed, Rows([(len(fed), len(past))]), [past])
        past.commit()
        tokens.append(int(lm.model.logits(hidden[-1:]).argmax()))
    assert tokens == first.tokens


def test_distances_beyond_what_was_trained_do_not_lengthen_the_context(make_small: Make) -> None:
    with pytest.raises(CapacityError, match=r"600 tokens.*512"):
        make_small("lm-infinite:local=513").new_engine().submit(request([1] * 600))
    make_small("lm-infinite:local=512").new_engine().submit(request([1] * 600))


@pytest.mark.parametrize("bad", [-1, 257, 10**12])
def test_ids_outside_the_vocabulary_are_refused_and_the_next_request_works(
    make_small: Make, bad: int
) -> None:
    lm = make_small()
    engine = lm.new_engine()
    with pytest.raises(ConfigError, match=str(bad)):
        engine.submit(request([1, bad]))
    assert run(engine, request([1, 2]))[0] == greedy_by_hand(lm, [1, 2], 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": [1], "max_new_tokens": -5}, "max_new_tokens"),
        ({"prompt": [1], "max_new_tokens": 2.5}, "max_new_tokens"),
        ({"prompt": [1], "max_new_tokens": True}, "max_new_tokens"),
        ({"prompt": [1], "stop": ("",)}, "stop"),
        ({"prompt": [1], "stop": (3,)}, "stop"),
    ],
)
def test_bad_requests_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(**options)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.lists(st.integers(1, 256), min_size=1, max_size=60), min_size=1, max_size=6),
    rows_per_step=st.integers(1, 80),
    max_sequences=st.integers(1, 6),
    cancelled=st.sets(st.integers(0, 5)),
)
def test_any_mix_of_requests_equals_each_alone(
    make_small: Make,
    prompts: list[list[int]],
    rows_per_step: int,
    max_sequences: int,
    cancelled: set[int],
) -> None:
    lm = make_small(draft="prompt-lookup:match=2,tokens=4,patience=0")
    engine = lm.new_engine(rows_per_step=rows_per_step, max_sequences=max_sequences)
    sequences = [engine.submit(request(prompt, max_new_tokens=8)) for prompt in prompts]
    engine.step()
    for index in cancelled:
        if index < len(sequences) and not sequences[index].is_finished:
            engine.cancel(sequences[index])
    for _ in engine.run():
        pass
    plain = make_small()
    for index, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        expected = run(plain.new_engine(), request(prompt, max_new_tokens=8))[0]
        tokens = list(sequence.result().tokens)
        assert tokens == expected[: len(tokens)]
        if index not in cancelled:
            assert tokens == expected
    assert engine.is_idle
    assert MemoryPlan.parse("full") == lm.plan
