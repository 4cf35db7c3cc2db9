"""Two devices, event by event, against what can be computed."""

from __future__ import annotations

from itertools import islice

import pytest
from numpy.random import default_rng

from plait.sim.devices import (
    Events,
    chain_tokens_per_step,
    decisions_from,
    pearl_tokens_per_step,
    simulate_chain,
    simulate_pearl,
)


@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("gamma", [2, 5, 8])
def test_simulations_agree_with_the_closed_forms(acceptance: float, gamma: int) -> None:
    ratio, tokens = 5.0, 60_000
    draws = iter(default_rng(gamma).random(3 * tokens).tolist())
    time = simulate_pearl(lambda: next(draws) < acceptance, gamma, ratio, tokens)
    assert tokens / time == pytest.approx(
        pearl_tokens_per_step(acceptance, gamma) / max(ratio, gamma), rel=0.015
    )
    draws = iter(default_rng(gamma).random(3 * tokens).tolist())
    time = simulate_chain(lambda: next(draws) < acceptance, gamma, ratio, tokens)
    assert tokens / time == pytest.approx(
        chain_tokens_per_step(acceptance, gamma) / (ratio + gamma), rel=0.015
    )


def test_a_perfect_draft_gives_a_window_a_step() -> None:
    assert simulate_pearl(lambda: True, 5, 5.0, 10_000) == pytest.approx(10_000, rel=0.01)
    assert simulate_pearl(lambda: False, 5, 5.0, 100) == pytest.approx(500)


def test_decisions_repeat_the_runs_that_were_measured() -> None:
    assert list(islice(decisions_from([2, 0]), 8)) == [True, True, False, False] * 2


def test_events_happen_in_the_order_of_their_times_and_then_of_asking() -> None:
    events, seen = Events(), []
    for name, delay in (("c", 2.0), ("a", 1.0), ("b", 1.0)):
        events.after(delay, lambda name=name: seen.append((name, events.now)))  # type: ignore[misc]
    events.run(lambda: False)
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0)]
