"""The budget of speculation: the best subtree, no guesses where they do not pay, and another try in time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from plait.claims.toy_laws import PROMPT, TableReader, chi_square, joint_law, random_table, tree_logits
from plait.decode import History, Sampler, Sampling
from plait.decode.speculate import (
    RSDS,
    SPECULATORS,
    Account,
    Chain,
    Context,
    DraftBudget,
    DraftModelConfig,
    PassTimes,
    Proposal,
    Speculator,
    Step,
    Tree,
    verify,
)
from plait.decode.speculate.budget import GRID, REST
from plait.errors import ConfigError

SIZE = 4
TARGET, DRAFT = random_table(SIZE, 1), random_table(SIZE, 2)
ROUNDING = 1e-9


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def linear(slope: float) -> Callable[[int], float]:
    """A pass takes 1 second for the first row, and `slope` for each further one."""
    return lambda rows: 1 + slope * (rows - 1)


def context_of(tokens: Sequence[int] = PROMPT, **options: Any) -> Context:
    sampler = Sampler(Sampling(**({"temperature": 0.0} | options)), SIZE)
    return Context(list(tokens), 96, 10**6, sampler, History(tokens))


def random_tree(random: np.random.Generator, size: int) -> Tree:
    return Tree(
        [PROMPT[-1], *random.integers(0, SIZE, size).tolist()],
        [-1, *(int(random.integers(0, node)) for node in range(1, size + 1))],
    )


class Fixed(Speculator):
    """Proposes one tree, and lets time pass meanwhile."""

    def __init__(self, tree: Tree, clock: Clock | None = None, seconds: float = 0.0) -> None:
        self.tree, self.clock, self.seconds = tree, clock, seconds
        self.calls = 0

    def propose(self, context: Context) -> Tree:
        self.calls += 1
        if self.clock is not None:
            self.clock.now += self.seconds
        return Tree([context.tokens[-1], *self.tree.tokens[1:]], self.tree.parents)


def rate(chosen: Sequence[int], reach: Sequence[float], seconds: Callable[[int], float]) -> float:
    return (1 + sum(reach[node] for node in chosen)) / seconds(1 + len(chosen))


@pytest.mark.parametrize("seed", range(12))
def test_the_chosen_subtree_is_the_best_of_all_connected_ones(seed: int) -> None:
    random = np.random.default_rng(seed)
    tree = random_tree(random, 8)
    budget, seconds = DraftBudget(clock=Clock()), linear(float(random.uniform(0.02, 0.4)))
    account = Account(budget)
    for node in range(1, len(tree)):
        for _ in range(20):
            account.chances.add(tree.slot(node), 0, bool(random.random() < 0.6))
    reach = account.shape(tree).reach
    connected = [
        chosen
        for count in range(9)
        for chosen in itertools.combinations(range(1, 9), count)
        if all(tree.parents[node] in (0, *chosen) for node in chosen)
    ]
    best = max(rate(chosen, reach, seconds) for chosen in connected)
    (found,) = budget.choose([Proposal(tree, account, True)], 1, seconds)
    given = [node for node in found.scored if node]
    if best >= 1.02 * rate((), reach, seconds):
        assert rate(given, reach, seconds) == pytest.approx(best, rel=ROUNDING)
    else:
        assert not given
    found.check(context_of(), SIZE)


def test_sequences_share_the_rows_of_a_pass_by_what_is_likely() -> None:
    budget = DraftBudget(clock=Clock())
    sure, unsure = Account(budget), Account(budget)
    tree = Tree([1, 2, 2], [-1, 0, 1])
    for node in (1, 2):
        for _ in range(60):
            sure.chances.add(tree.slot(node), 0, True)
            unsure.chances.add(tree.slot(node), 0, False)
    given = budget.choose([Proposal(tree, sure, True), Proposal(tree, unsure, True)], 2, linear(0.3))
    assert [one.num_scored for one in given] == [3, 1]
    # The same trees where rows cost next to nothing.
    cheap = DraftBudget(clock=Clock())
    given = cheap.choose([Proposal(tree, sure, True), Proposal(tree, unsure, True)], 2, linear(1e-6))
    assert given[0].num_scored == 3


def test_times_are_measured_once_as_far_as_needed_and_follow_what_happens() -> None:
    asked: list[int] = []

    def seconds(rows: int) -> float:
        asked.append(rows)
        return 1 + rows / 10

    times = PassTimes()
    times.measure(5, seconds)
    assert sorted(set(asked)) == [1, 2, 4, 8]
    times.measure(3, seconds)
    assert len(asked) == 6
    assert times([1, 3, 8, 16]).tolist() == pytest.approx([1.1, 1.3, 1.8, 2.6])
    for _ in range(200):
        times.observe(1, 2.2)
        times.observe(8, 3.6)
    assert times([1, 8]).tolist() == pytest.approx([2.2, 3.6], rel=0.1)
    # An interruption counts as one slow pass.
    before = float(times(8))
    times.observe(8, 1e6)
    assert float(times(8)) < 1.2 * before
    assert (np.diff(times(np.arange(1, 200))) >= 0).all()


def test_passes_are_timed_beforehand_once_and_only_where_time_decides() -> None:
    asked: list[int] = []

    def seconds(rows: int) -> float:
        asked.append(rows)
        return 1.0

    times = PassTimes()
    for mode in ("off", 4):
        DraftBudget(mode, times=times).prepare(seconds)
    assert not asked
    budget = DraftBudget(times=times, clock=Clock())
    budget.prepare(seconds)
    assert set(asked) == {1, 2, 4, 8}
    count = len(asked)
    budget.choose([Proposal(Tree([1, 2], [-1, 0]), Account(budget), True)], 1, seconds)
    assert len(asked) == count


def run(
    speculator: Speculator,
    truth: Callable[[int], int],
    steps: int,
    seconds: Callable[[int], float],
    clock: Clock,
) -> tuple[int, list[int]]:
    """Tokens that come out of `steps` passes, and the rows of each."""
    budget = DraftBudget(clock=clock)
    account = Account(budget)
    tokens, rows = list(PROMPT), []
    for _ in range(steps):
        proposal = account.propose(speculator, context_of(tokens))
        (tree,) = budget.choose([proposal], 1, seconds)
        rows.append(tree.num_scored)
        logits = torch.zeros(tree.num_scored, SIZE)
        for row, node in enumerate(tree.scored):
            logits[row, truth(len(tokens) + tree.depths()[node])] = 9.0
        path, choices = verify(tree, logits, context_of(tokens).sampler, History(tokens))
        clock.now += seconds(tree.num_scored)
        budget.times.observe(tree.num_scored, seconds(tree.num_scored))
        tokens += [choice.token for choice in choices]
        speculator.observe(tokens, tree, path, logits)
        budget.settle(account, tree, path, tokens[-len(path) :], Step(tree.num_scored, 1))
    return len(tokens) - len(PROMPT), rows


@pytest.mark.parametrize("draft_seconds", [0.0, 0.5])
def test_useless_drafts_end_in_plain_decoding_and_are_tried_again(draft_seconds: float) -> None:
    clock = Clock()
    wrong = Fixed(Tree([0, 1, 1, 1], [-1, 0, 1, 2]), clock, draft_seconds)
    count, rows = run(wrong, lambda position: 2, 600, linear(0.5), clock)
    assert count == 600
    assert rows[60:90] == [1] * 30
    assert clock.now <= 1.05 * 600
    if draft_seconds:
        assert 2 <= wrong.calls < 40
        assert wrong.calls < 600 * 0.04 / draft_seconds + 16


def test_good_drafts_are_kept_and_one_that_becomes_good_is_noticed() -> None:
    clock = Clock()
    chain = Fixed(Tree([0, 1, 1, 1], [-1, 0, 1, 2]), clock, 0.01)
    count, rows = run(chain, lambda position: 1, 100, linear(0.05), clock)
    assert count > 350
    assert rows[-20:] == [4] * 20
    late = Fixed(Tree([0, 1, 1, 1], [-1, 0, 1, 2]), clock, 0.05)
    count, rows = run(late, lambda position: 1 if position > 150 else 2, 600, linear(0.05), clock)
    assert rows[100:140] == [1] * 40
    assert rows[-20:] == [4] * 20
    assert count > 600 + REST


class Drawing(Speculator):
    """Draws a tree of a draft table, and lets each be trimmed."""

    def __init__(self, config: DraftModelConfig, reader: Any) -> None:
        self.inner = config.guess_with(reader)

    def propose(self, context: Context) -> Tree:
        return self.inner.propose(context)


@pytest.mark.parametrize(
    ("config", "least"), [(Chain(tokens=3), 0.2), (RSDS(width=3, depth=2), 0.05)], ids=["chain", "rsd-s"]
)
def test_trimming_drawn_trees_by_their_places_keeps_the_law(config: DraftModelConfig, least: float) -> None:
    found = []
    budget = DraftBudget(clock=Clock())
    for seed in range(700):
        speculator = Drawing(config, TableReader(DRAFT))
        sampler = Sampler(Sampling(seed=seed), SIZE)
        tokens, history = list(PROMPT), History(PROMPT)
        account = Account(budget)
        account.trial, account.rest, account.least = 0, 0, least
        while len(tokens) < len(PROMPT) + 2:
            proposal = account.propose(speculator, Context(tokens, 96, 10**6, sampler, history))
            (tree,) = budget.choose([proposal], 1, linear(0.1))
            logits = tree_logits(TARGET, tokens, tree)[tree.scored]
            path, choices = verify(tree, logits, sampler, history)
            account.learn(tree, path, [choice.token for choice in choices])
            for choice in choices:
                tokens.append(choice.token)
                history.append(choice.token)
        found.append(tuple(tokens[2:4]))
    assert chi_square(found, joint_law(TARGET, Sampling(), 2)) > 1e-4


class Learning(Fixed):
    """Takes as long to learn from a pass as the pass itself."""

    def observe(self, *args: Any) -> None:
        assert self.clock is not None
        self.clock.now += 1.0

    def pass_over(self, *args: Any) -> None:
        pass


def test_what_learning_costs_counts_and_is_not_done_while_guessing_rests() -> None:
    clock = Clock()
    budget = DraftBudget(clock=clock)
    account, tokens = Account(budget), list(PROMPT)
    # Guesses cost nothing and are right half of the time; only to learn from them is dear.
    speculator = Learning(Tree([0, 1], [-1, 0]), clock)
    for number in range(400):
        proposal = account.propose(speculator, context_of(tokens))
        (tree,) = budget.choose([proposal], 1, linear(0.0))
        path = [0, 1][: 1 + (len(tree) > 1 and number % 2)]
        following = [1] * len(path)
        clock.now += 1
        tokens += following
        account.observe(speculator, tokens, tree, path, torch.zeros(tree.num_scored, SIZE))
        budget.settle(account, tree, path, following, Step(tree.num_scored, 1))
    assert account.is_resting
    assert 2 <= speculator.calls < 12
    assert clock.now < 1.03 * 400


def test_a_number_bounds_the_guesses_and_off_takes_all() -> None:
    tree = Tree([1, 2, 3, 0], [-1, 0, 1, 2])
    for mode in ("off", 96):
        budget = DraftBudget(mode, clock=Clock())
        proposal = Account(budget).propose(Fixed(tree), context_of())
        assert budget.choose([proposal], 1, linear(9.0))[0].num_scored == 4

    class Asked(Speculator):
        def propose(self, context: Context) -> Tree:
            return Tree.chain([context.tokens[-1]] * (context.budget + 1))

    assert len(Account(DraftBudget(2)).propose(Asked(), context_of()).tree) == 3
    for text in ("chain:budget=0", "chain:budget=many", "prompt-lookup:budget=-1"):
        with pytest.raises(ConfigError, match="budget"):
            SPECULATORS.parse(text)
    assert str(SPECULATORS.parse("token-recycling:budget=8")) == "token-recycling:budget=8"


def test_a_seed_that_was_given_keeps_drawn_trees_whole() -> None:
    speculator = Chain(tokens=3).guess_with(TableReader(DRAFT))
    assert not speculator.may_trim(Sampler(Sampling(seed=3), SIZE))
    assert speculator.may_trim(Sampler(Sampling(), SIZE))
    assert speculator.may_trim(Sampler(Sampling(temperature=0.0, seed=3), SIZE))
    budget = DraftBudget(clock=Clock())
    account = Account(budget)
    account.rest, account.trial = 9, 0
    proposal = account.propose(speculator, context_of(temperature=1.0, seed=3))
    assert budget.choose([proposal], 1, linear(5.0))[0].num_scored == 4


def test_probes_are_counted_with_the_guess_that_they_stand_behind() -> None:
    tree = Tree([1, 2, 3, 3, 3, 3], [-1, 0, 1, 2, 0, 4], probes=frozenset({2, 3, 4, 5}))
    budget = DraftBudget(clock=Clock())
    account = Account(budget)
    assert account.shape(tree).cost == [3, 3, 0, 0, 0, 0]
    (cheap,) = budget.choose([Proposal(tree, account, True)], 1, linear(0.01))
    assert cheap.num_scored == 6
    (dear,) = DraftBudget(clock=Clock()).choose([Proposal(tree, account, True)], 1, linear(1.0))
    assert dear.scored == [0, 4, 5]


def test_the_grid_is_the_one_that_is_documented() -> None:
    assert GRID == (1, 2, 4, 8, 16, 32, 64, 96)
