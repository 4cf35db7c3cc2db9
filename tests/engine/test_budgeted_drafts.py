"""Drafts in the engine under the budget of this machine's own times, and drafts beside the check."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from plait.decode import Sampling
from plait.decode.speculate import DraftBudget
from plait.decode.speculate.draft_model import Reader
from plait.engine import LanguageModel, Request
from plait.errors import PlaitError

Make = Callable[..., LanguageModel]

PROMPTS = [[5, 6, 7], list(range(1, 60)), [9], [3, 1, 4, 1, 5, 9, 2, 6] * 5]
DRAFTS = [
    "prompt-lookup",
    "token-recycling",
    "mix:prompt-lookup:match=2+chain:layers=1",
    "rsd-s:layers=2",
    "pearl:layers=1",
    "pearl:layers=2,gamma=3",
]


def requests(sampling: Sampling, count: int = 24) -> list[Request]:
    return [
        Request(prompt=prompt, sampling=sampling, max_new_tokens=count, ignore_end=True) for prompt in PROMPTS
    ]


def answers(lm: LanguageModel, asked: list[Request], **options: Any) -> list[list[int]]:
    engine = lm.new_engine(**options)
    sequences = [engine.submit(request) for request in asked]
    for _ in engine.run():
        pass
    engine.check_integrity()
    return [list(sequence.result().tokens) for sequence in sequences]


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_answers_do_not_depend_on_the_draft_or_its_budget(make_small: Make, draft: str) -> None:
    memory = "window:size=40,sinks=2"
    asked = requests(Sampling(temperature=0.0))
    plain = answers(make_small(memory), asked)
    lm = make_small(memory, draft)
    # Cheap rows and dear ones, whatever this machine has; then its own times.
    for slope in (0.0, 9.0):
        lm.draft_budget = DraftBudget("auto")
        lm.draft_budget.times.measure(96, lambda rows, slope=slope: 1 + slope * rows)  # type: ignore[misc]
        assert answers(lm, asked) == plain
    lm.draft_budget = DraftBudget("auto")
    assert answers(lm, asked, max_sequences=2, rows_per_step=16) == plain


@pytest.mark.parametrize("draft", ["token-recycling", "chain:layers=1", "pearl:layers=2"])
def test_native_answers_are_the_same_bits(make_packed: Make, draft: str) -> None:
    asked = requests(Sampling(temperature=0.0))
    lm = make_packed(draft=draft)
    lm.draft_budget = DraftBudget("auto")
    assert answers(lm, asked) == answers(make_packed(), asked)


@pytest.mark.parametrize("draft", ["chain:layers=1", "rsd-s:layers=1", "pearl:layers=1"])
def test_a_seed_gives_the_same_text_whatever_passes_cost(make_small: Make, draft: str) -> None:
    asked = requests(Sampling(temperature=0.9, seed=4), 12)[:1]
    lm = make_small(draft=draft)
    found = []
    for slope in (0.0, 9.0):
        lm.draft_budget = DraftBudget("auto")
        lm.draft_budget.times.measure(96, lambda rows, slope=slope: 1 + slope * rows)  # type: ignore[misc]
        found.append(answers(lm, asked))
    assert found[0] == found[1]


def test_rows_that_are_dear_are_not_spent_and_cheap_ones_are(make_small: Make) -> None:
    asked = requests(Sampling(temperature=0.0), 60)[3:]
    rows = []
    for slope in (0.0, 9.0):
        lm = make_small(draft="token-recycling")
        budget = lm.draft_budget = DraftBudget("auto", clock=lambda: 0.0)
        budget.times.measure(96, lambda count, slope=slope: 1 + slope * count)  # type: ignore[misc]
        budget.times.observe = lambda rows, seconds: None  # type: ignore[method-assign]
        engine = lm.new_engine()
        for request in asked:
            engine.submit(request)
        for _ in engine.run():
            pass
        rows.append(engine.metrics.proposed)
    assert rows[0] > 60
    assert rows[1] < 10


def test_the_draft_works_while_the_model_does(make_small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_small(draft="pearl:layers=1,gamma=1,budget=off")
    meeting = threading.Barrier(2, timeout=30)
    answer, start = lm.model.answer, Reader.start
    engine = lm.new_engine()
    sequence = engine.submit(requests(Sampling(temperature=0.0), 8)[0])

    def slow_answer(*args: Any, **options: Any) -> Any:
        # Passes over the last tokens leave nothing to draft.
        if len(sequence.choices) < 6:
            meeting.wait()
        return answer(*args, **options)

    def slow_start(reader: Reader, tokens: Any) -> Any:
        meeting.wait()
        return start(reader, tokens)

    monkeypatch.setattr(lm.model, "answer", slow_answer)
    monkeypatch.setattr(Reader, "start", slow_start)
    while len(sequence.choices) < 5:
        engine.step()
    engine.cancel(sequence)


def test_a_draft_that_fails_ends_its_own_sequence_only(
    make_small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_small(draft="pearl:layers=1,gamma=2")
    asked = requests(Sampling(temperature=0.0))
    start = Reader.start

    def broken(reader: Reader, tokens: Any) -> Any:
        if list(tokens[:3]) == PROMPTS[0]:
            raise PlaitError("the draft is broken")
        return start(reader, tokens)

    monkeypatch.setattr(Reader, "start", broken)
    engine = lm.new_engine()
    sequences = [engine.submit(request) for request in asked]
    with pytest.raises(PlaitError, match="the draft is broken"):
        list(engine.run())
    for _ in engine.run():
        pass
    plain = answers(make_small(), asked)
    assert [list(sequence.result().tokens) for sequence in sequences[1:]] == plain[1:]


@pytest.mark.parametrize(("seconds", "rests"), [(3.0, True), (0.0, False)])
def test_a_draft_beside_the_model_rests_where_steps_become_longer(
    make_small: Make, seconds: float, rests: bool
) -> None:
    now = [0.0]
    lm = make_small(draft="pearl:layers=1,gamma=1")
    budget = lm.draft_budget = DraftBudget("auto", clock=lambda: now[0])
    budget.times.measure(1, lambda count: 1.0)
    starts = 0
    answer, start = lm.model.answer, Reader.start

    def timed_answer(*args: Any, **options: Any) -> Any:
        now[0] += 1.0
        return answer(*args, **options)

    def counted_start(reader: Reader, tokens: Any) -> Any:
        nonlocal starts
        starts += 1
        now[0] += seconds
        return start(reader, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.model, "answer", timed_answer)
        patch.setattr(Reader, "start", counted_start)
        engine = lm.new_engine()
        engine.submit(requests(Sampling(temperature=0.0), 30)[0])
        for _ in engine.run():
            pass
    assert (starts < 8) == rests
    assert (budget.rest > 0) == rests
