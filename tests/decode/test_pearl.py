"""PEARL: drafting and checking at the same time, the same text as without, and runs without a longest length."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from plait.claims.toy_laws import (
    PROMPT,
    TableReader,
    chi_square,
    joint_law,
    logits_at,
    random_table,
    tree_logits,
)
from plait.decode import History, Sampler, Sampling
from plait.decode.speculate import PEARL, Context, Tree, verify
from plait.errors import ConfigError

SIZE = 4
TARGET, DRAFT = random_table(SIZE, 1), random_table(SIZE, 2)


def steps(
    sampling: Sampling,
    gamma: Any,
    length: int,
    draft: torch.Tensor = DRAFT,
    target: torch.Tensor = TARGET,
    is_done: Callable[[], bool] = lambda: True,
) -> tuple[tuple[int, ...], list[tuple[int, int, int]]]:
    """`length` tokens; and for each pass: nodes scored, nodes drafted beside it, and tokens that came out."""
    sampler, history, tokens = Sampler(sampling, SIZE), History(PROMPT), list(PROMPT)
    speculator = PEARL(gamma=gamma, layers=1).guess_with(TableReader(draft))
    found = []
    while len(tokens) < len(PROMPT) + length:
        context = Context(list(tokens), len(PROMPT) + length - len(tokens) - 1, 10**6, sampler, history)
        window = speculator.propose(context)
        window.check(context, SIZE)
        tree = speculator.ahead(window, is_done)
        assert tree.scored == list(range(len(window)))
        assert tree.tokens[: len(window)] == window.tokens
        path, choices = verify(tree, tree_logits(target, tokens, tree)[tree.scored], sampler, history)
        for choice in choices:
            tokens.append(choice.token)
            history.append(choice.token)
        found.append((len(window), len(tree) - len(window), len(choices)))
        speculator.observe(tokens, tree, path, torch.zeros(len(window), SIZE))
    return tuple(tokens[len(PROMPT) :]), found


@pytest.mark.parametrize("gamma", [1, 3])
def test_the_text_has_the_law_of_the_model(gamma: int) -> None:
    found = [steps(Sampling(seed=seed), gamma, 3)[0] for seed in range(500)]
    assert chi_square(found, joint_law(TARGET, Sampling(), 3)) > 1e-4


def test_greedy_tokens_are_those_of_plain_decoding_whatever_the_time() -> None:
    expected, text = [], list(PROMPT)
    for _ in range(40):
        text.append(int(logits_at(TARGET, text).argmax()))
        expected.append(text[-1])
    random = np.random.default_rng(0)
    for gamma in (1, 2, 5, "auto"):
        tokens, _ = steps(Sampling(temperature=0.0), gamma, 40, is_done=lambda: bool(random.random() < 0.3))
        assert list(tokens) == expected


def test_a_seeded_text_does_not_depend_on_how_long_passes_take() -> None:
    for seed in range(8):
        random = np.random.default_rng(seed)
        quick = steps(Sampling(seed=seed), "auto", 20, is_done=lambda: True)
        slow = steps(Sampling(seed=seed), "auto", 20, is_done=lambda: False)
        mixed = steps(Sampling(seed=seed), "auto", 20, is_done=lambda: bool(random.random() < 0.5))  # noqa: B023
        assert quick == slow == mixed


def test_a_draft_that_is_the_model_runs_on_without_an_end() -> None:
    for temperature in (0.0, 1.0):
        _, found = steps(Sampling(temperature=temperature, seed=1), 3, 30, draft=TARGET)
        # The first pass judges one token of what is drafted beside it; each later one judges three.
        assert found[0] == (1, 3, 1)
        assert all(step == (3, 3, 3) for step in found[1:-2])


def test_a_pass_judges_what_the_state_machine_says() -> None:
    _, found = steps(Sampling(seed=5), 4, 200)
    assert found[0][0] == 1
    for (scored, drafted, emitted), (following, _, _) in pairwise(found[:-3]):
        assert drafted == 4
        assert 1 <= emitted <= scored
        # After a wrong guess nothing waits; after a window that was right all but the first of the next one may.
        assert following in ((1, 4) if emitted == scored else (1,))
    assert {scored for scored, _, _ in found[:-3]} == {1, 4}


def test_the_first_guess_behind_a_window_is_judged_by_its_last_row() -> None:
    sampler, history = Sampler(Sampling(temperature=0.0), SIZE), History(PROMPT)
    logits = torch.zeros(2, SIZE)
    logits[0, 2] = logits[1, 3] = 1.0
    right = Tree([1, 2, 3, 0], [-1, 0, 1, 2], unscored=frozenset({2, 3}))
    path, choices = verify(right, logits, sampler, history)
    assert (path, [choice.token for choice in choices]) == ([0, 1], [2, 3])
    with pytest.raises(ConfigError, match="below an unscored"):
        Tree([1, 2, 3], [-1, 0, 1], unscored=frozenset({1})).check(
            Context([1], 9, 99, sampler, history), SIZE
        )


def test_expected_tokens_for_each_pass_follow_from_the_acceptance() -> None:
    from plait.sim.devices import pearl_tokens_per_step

    acceptance, gamma = 0.7, 3
    # Target and draft overlap by the acceptance at every place, whatever came before.
    target = torch.full((SIZE, SIZE, SIZE), -torch.inf, dtype=torch.float64)
    draft = target.clone()
    target[..., 0], target[..., 1] = np.log(acceptance), np.log(1 - acceptance)
    draft[..., 0], draft[..., 2] = np.log(acceptance), np.log(1 - acceptance)
    tokens, found = steps(Sampling(seed=3), gamma, 1200, draft=draft, target=target)
    assert len(tokens) / len(found) == pytest.approx(pearl_tokens_per_step(acceptance, gamma), rel=0.06)


def test_settings_outside_their_limits_are_refused() -> None:
    for gamma in (0, 65, "fast"):
        with pytest.raises(ConfigError, match=r"PEARL\.gamma"):
            PEARL(gamma=gamma, layers=1)


def test_threads_meet() -> None:
    """The engine's drafting thread runs beside the caller and is over when the block is."""
    from plait.engine.feed import Drafting

    barrier = threading.Barrier(2, timeout=20)

    class Waits:
        def ahead(self, tree: Tree, is_done: Callable[[], bool]) -> Tree:
            barrier.wait()
            while not is_done():
                threading.Event().wait(0.001)
            return Tree.chain([*tree.tokens, 1])

    drafting = Drafting()
    key: Any = "sequence"
    with drafting.beside({key: (Waits(), Tree.root(3))}) as found:  # type: ignore[dict-item]
        barrier.wait()
        assert not found[key].done()
    assert found[key].result().tokens == [3, 1]
