"""The verifier: text checked from draft trees has the model's law, whatever the tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plait.claims.toy_laws import (
    PROMPT,
    Propose,
    chi_square,
    continuation,
    joint_law,
    logits_at,
    random_table,
)
from plait.decode import History, Sampler, Sampling, Streams
from plait.decode.speculate import Context, Tree, verify
from plait.errors import ConfigError

SIZE = 4
LENGTH = 3
SAMPLES = 4000
# Chance that a right verifier fails one such test.
RARE = 1e-4

TARGET = random_table(SIZE, 1)
DRAFT = random_table(SIZE, 2)
WARPED = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2)
LAWS = {"plain": Sampling(), "warped": WARPED, "penalties": Sampling(presence_penalty=1, frequency_penalty=1)}


def drafted_law(context: Context, path: Sequence[int]) -> Tensor:
    """The draft's own law behind a path of guesses."""
    history = context.history.fork()
    history.extend(path)
    return context.sampler.law(logits_at(DRAFT, [*context.tokens, *path]), history)


def drawn_tree(
    branch: Sequence[int], seed: int, replacement: bool, fixed: Sequence[int] = (), reverse: bool = False
) -> Propose:
    """Trees whose level l has `branch[l]` drawn children for each node, and `fixed` ones that were not drawn."""
    random = np.random.default_rng(seed)

    def propose(context: Context) -> Tree:
        tokens, parents, paths = [context.tokens[-1]], [-1], [[]]
        drawn: set[int] = set()
        laws: dict[int, Tensor] = {}
        level = [0]
        for count in branch:
            below = []
            for node in level:
                law = drafted_law(context, paths[node])
                mass = law.numpy() / law.numpy().sum()
                size = count if replacement else min(count, int((mass > 0).sum()))
                draws = random.choice(SIZE, size, replace=replacement, p=mass)
                if reverse:
                    draws = np.sort(draws)[::-1]
                laws[node] = law
                for order, token in enumerate([*draws.tolist(), *fixed]):
                    if order < len(draws):
                        drawn.add(len(tokens))
                    below.append(len(tokens))
                    tokens.append(token)
                    parents.append(node)
                    paths.append([*paths[node], token])
            level = below
        return Tree(tokens, parents, frozenset(drawn), laws, replacement)

    return propose


def outcomes(propose: Propose, sampling: dict[str, Any], samples: int = SAMPLES) -> list[tuple[int, ...]]:
    return [
        continuation(TARGET, Sampler(Sampling(**sampling, seed=seed), SIZE), propose, LENGTH, 100)[0]
        for seed in range(samples)
    ]


def settings_of(sampling: Sampling) -> dict[str, Any]:
    return {key: value for key, value in sampling.to_json().items() if key not in ("name", "seed")}


TREES = {
    "chain": drawn_tree([1, 1, 1], 0, replacement=False),
    "tree": drawn_tree([2, 2], 1, replacement=False),
    "with-replacement": drawn_tree([3], 2, replacement=True),
    "mixed": drawn_tree([1, 2], 3, replacement=False, fixed=(2,)),
}


@pytest.mark.parametrize(
    ("tree", "name"),
    [(tree, "plain") for tree in TREES] + [("tree", "warped"), ("mixed", "warped"), ("chain", "penalties")],
)
def test_drawn_trees_keep_the_joint_law(tree: str, name: str) -> None:
    law = joint_law(TARGET, LAWS[name], LENGTH)
    assert chi_square(outcomes(TREES[tree], settings_of(LAWS[name])), law) > RARE


def test_the_test_notices_another_law_and_siblings_out_of_order() -> None:
    law = joint_law(TARGET, Sampling(), LENGTH)
    good = outcomes(drawn_tree([2, 2], 1, replacement=False), {})
    assert chi_square(good, joint_law(TARGET, Sampling(temperature=0.9), LENGTH)) < RARE
    bad = outcomes(drawn_tree([3, 2], 1, replacement=False, reverse=True), {})
    assert chi_square(bad, law) < RARE


def test_the_test_notices_a_uniform_that_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Streams.uniform

    def shared(streams: Streams, position: int, round: int = 0, purpose: str = "verify") -> float:
        return original(streams, 0, 0, purpose)

    monkeypatch.setattr(Streams, "uniform", shared)
    bad = outcomes(drawn_tree([1, 1], 1, replacement=False), {})
    assert chi_square(bad, joint_law(TARGET, Sampling(), LENGTH)) < RARE


def test_a_round_and_the_last_draw_share_no_uniform() -> None:
    streams = Streams(3)
    keys = [(position, round) for position in range(4) for round in range(4)]
    assert len({streams.uniform(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("seed", range(40))
def test_nodes_that_were_not_drawn_give_the_tokens_of_plain_decoding(seed: int) -> None:
    random = np.random.default_rng(seed)
    sampling = Sampling(temperature=[0.0, 0.7, 1.0][seed % 3], repetition_penalty=1.1, seed=seed)

    def guess(context: Context) -> Tree:
        # Any tree at all, duplicates of siblings included.
        size = int(random.integers(1, 9))
        tokens = [context.tokens[-1], *random.integers(0, SIZE, size - 1).tolist()]
        return Tree(tokens, [-1, *(int(random.integers(0, node)) for node in range(1, size))])

    def nothing(context: Context) -> Tree:
        return Tree.root(context.tokens[-1])

    plain, checks = continuation(TARGET, Sampler(sampling, SIZE), nothing, 40)
    guessed, fewer = continuation(TARGET, Sampler(sampling, SIZE), guess, 40)
    assert guessed == plain
    assert checks == 40
    assert fewer < checks


def test_greedy_tokens_do_not_depend_on_drawn_guesses() -> None:
    greedy = Sampler(Sampling(temperature=0.0), SIZE)
    law = torch.full((SIZE,), 1 / SIZE)
    history = History(PROMPT)
    best = int(logits_at(TARGET, PROMPT).argmax())
    for token in range(SIZE):
        tree = Tree([PROMPT[-1], token], [-1, 0], frozenset({1}), {0: law})
        logits = torch.stack([logits_at(TARGET, PROMPT), logits_at(TARGET, (PROMPT[-1], token))])
        path, choices = verify(tree, logits, greedy, history)
        assert choices[0].token == best
        assert path == ([0, 1] if token == best else [0])
        assert len(history) == len(PROMPT)


def test_accepted_draws_report_the_log_probabilities_of_the_model() -> None:
    sampler = Sampler(Sampling(seed=1, logprobs=2), SIZE)
    logits = torch.stack([logits_at(TARGET, PROMPT)] * 2)
    certain = torch.zeros(SIZE)
    certain[2] = 1.0
    logits[0, :] = torch.tensor([0.0, 0.0, 9.0, 0.0])
    tree = Tree([PROMPT[-1], 2], [-1, 0], frozenset({1}), {0: certain})
    path, choices = verify(tree, logits, sampler, History(PROMPT))
    assert path == [0, 1]
    assert choices[0].logprob == pytest.approx(float(logits[0].log_softmax(0)[2]))
    assert choices[0].alternatives[0].token == 2


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
def test_tokens_for_each_check_of_a_chain_follow_from_the_acceptance(acceptance: float) -> None:
    # Target and draft overlap by `acceptance` at every position, whatever came before.
    target = torch.tensor([acceptance, 1 - acceptance, 0.0], dtype=torch.float64)
    draft = torch.tensor([acceptance, 0.0, 1 - acceptance], dtype=torch.float64)
    random = np.random.default_rng(0)
    emitted, checks, guesses = 0, 6000, 3
    for seed in range(checks):
        tokens = [0, *random.choice(3, guesses, p=draft.numpy()).tolist()]
        tree = Tree(
            tokens, list(range(-1, guesses)), frozenset(range(1, guesses + 1)), dict.fromkeys(range(3), draft)
        )
        sampler = Sampler(Sampling(seed=seed), 3)
        emitted += len(verify(tree, target.log().expand(guesses + 1, -1), sampler, History([0]))[1])
    expected = (1 - acceptance ** (guesses + 1)) / (1 - acceptance)
    assert emitted / checks == pytest.approx(expected, rel=0.03)


def _root_with(tokens: list[int], **declared: Any) -> Callable[[Context], Tree]:
    return lambda context: Tree([context.tokens[-1], *tokens], [-1] + [0] * len(tokens), **declared)


@pytest.mark.parametrize(
    ("propose", "message"),
    [
        (_root_with([9]), "Node 1 proposes token 9"),
        (_root_with([-1]), "Node 1 proposes token -1"),
        (_root_with([1], drawn=frozenset({1})), "parent 0 needs a draft law"),
        (_root_with([1], drawn=frozenset({1}), laws={0: torch.ones(3)}), r"shape \(4,\)"),
        (
            _root_with([1], drawn=frozenset({1}), laws={0: torch.tensor([1.0, 0.0, 0.0, 0.0])}),
            "cannot have drawn",
        ),
    ],
)
def test_trees_that_cannot_be_judged_are_refused(propose: Propose, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        continuation(TARGET, Sampler(Sampling(seed=0), SIZE), propose, 1)
