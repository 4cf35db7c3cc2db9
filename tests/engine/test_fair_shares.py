"""Tenants get equal shares, and one sequence that fails fails alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from plait.decode import Sampling
from plait.decode.speculate import Context, Speculator, Tree
from plait.engine import Engine, LanguageModel, Request, RunningSequence
from plait.engine.scheduler import Scheduler
from plait.errors import ConfigError, PlaitError
from plait.memory import POLICIES, Memory, MemoryPlan, Segment, Visit
from plait.memory.policies.full import Full

Make = Callable[..., LanguageModel]


def ask(prompt: list[int], tenant: str = "", count: int = 12) -> Request:
    return Request(
        prompt=prompt,
        max_new_tokens=count,
        sampling=Sampling(temperature=0.0),
        ignore_end=True,
        tenant=tenant,
    )


def step_of_each_end(engine: Engine) -> dict[RunningSequence, int]:
    ends: dict[RunningSequence, int] = {}
    number = 0
    while not engine.is_idle:
        number += 1
        ends |= {sequence: number for sequence, piece in engine.step() if piece.finish_reason}
        engine.check_integrity()
    return ends


def tokens_alone(lm: LanguageModel, request: Request) -> tuple[int, ...]:
    engine = lm.new_engine()
    sequence = engine.submit(request)
    for _ in engine.run():
        pass
    return sequence.result().tokens


def test_a_tenant_with_many_requests_does_not_hold_up_one_with_few(make_small: Make) -> None:
    engine = make_small().new_engine(max_sequences=4)
    crowd = [engine.submit(ask([i + 1, 5, 6], "crowd", 30)) for i in range(40)]
    for _ in range(3):
        engine.step()
    guest = engine.submit(ask([7, 7], "guest", 10))
    ends = step_of_each_end(engine)
    # A place is made for the guest at once, so he needs one step for each of his tokens.
    assert ends[guest] == 10
    assert sum(ends[one] < ends[guest] for one in crowd) == 0
    assert len(ends) == 41


def test_whoever_was_set_aside_goes_on_where_he_was(make_small: Make) -> None:
    lm = make_small()
    engine = lm.new_engine(max_sequences=2)
    crowd = [engine.submit(ask([i + 1, 5, 6], "crowd", 20)) for i in range(2)]
    for _ in range(4):
        engine.step()
    engine.submit(ask([7, 7], "guest", 3))
    engine.step()
    assert [one.held for one in crowd] == [3 + 4, 3 + 3]
    steps = len([None for _ in engine.run()])
    assert steps <= 15 + 16 + 2
    assert [one.result().tokens for one in crowd] == [tokens_alone(lm, one.request) for one in crowd]


def test_long_prompts_of_one_tenant_take_turns_with_those_of_another(make_small: Make) -> None:
    engine = make_small().new_engine(rows_per_step=50)
    long = [engine.submit(ask([i + 1] * 400, "reader", 1)) for i in range(3)]
    engine.step()
    short = [engine.submit(ask([i + 1] * 40, "asker", 1)) for i in range(3)]
    ends = step_of_each_end(engine)
    assert max(ends[one] for one in short) <= 6
    assert min(ends[one] for one in long) > 6


def test_one_tenant_is_served_in_order_of_arrival(make_small: Make) -> None:
    engine = make_small().new_engine(max_sequences=1)
    sequences = [engine.submit(ask([i + 1], count=3)) for i in range(5)]
    assert list(step_of_each_end(engine)) == sequences


def test_a_tenant_that_was_away_has_saved_up_no_claim(make_small: Make) -> None:
    lm = make_small()
    scheduler = Scheduler(2)
    old, young, late = (
        RunningSequence(ask([1], name), None, lm.tokenizer, None, 512)  # type: ignore[arg-type]
        for name in ("old", "young", "late")
    )
    scheduler.add(old)
    scheduler.place(old)
    scheduler.charge(old, 1000)
    scheduler.add(young)
    scheduler.place(young)
    scheduler.charge(young, 10)
    scheduler.add(late)
    assert scheduler._served == {"old": 1000, "young": 1010, "late": 1000}
    for one in (old, young, late):
        scheduler.remove(one)
    assert not scheduler._served


def test_a_prompt_that_breaks_the_forward_pass_fails_alone(make_small: Make) -> None:
    class Picky(Full, name="picky"):
        """Sees everything, but not of a prompt of 13 tokens."""

        def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
            if segment.length == 13:
                raise PlaitError("thirteen")
            return super().visits(memory, segment)

    try:
        lm = make_small()
        lm.plan = MemoryPlan(policy=Picky())
        engine = lm.new_engine()
        good = [engine.submit(ask([i + 1, 2])) for i in range(3)]
        bad = engine.submit(ask([1] * 13))
        with pytest.raises(PlaitError, match="thirteen"):
            engine.step()
        engine.check_integrity()
        texts = dict.fromkeys(good, "")
        for sequence, piece in engine.run():
            texts[sequence] += piece.text
        assert isinstance(bad.error, PlaitError)
        assert bad.is_finished
        assert [one.result().tokens for one in good] == [
            tokens_alone(make_small(), one.request) for one in good
        ]
        # Nothing of what the others were given in the step that failed is lost.
        assert texts == {one: one.result().text for one in good}
    finally:
        POLICIES.methods.pop("picky", None)


def test_a_speculator_that_fails_ends_its_own_sequence_only(make_small: Make) -> None:
    class Broken(Speculator):
        def __init__(self) -> None:
            made.append(self)

        def propose(self, context: Context) -> Tree:
            if self is made[1]:
                raise ConfigError("no idea")
            return Tree.root(context.tokens[-1])

    made: list[Broken] = []
    lm = make_small()
    engine = Engine(lm.model, lm.tokenizer, lm.plan, new_speculator=Broken)
    first, second, third = (engine.submit(ask([i + 1, 2])) for i in range(3))
    pieces: list[Any] = []
    while not engine.is_idle:
        pieces += engine.advance()
    assert isinstance(second.error, ConfigError)
    for one in (first, third):
        assert one.error is None
        assert one.result().tokens == tokens_alone(lm, one.request)
