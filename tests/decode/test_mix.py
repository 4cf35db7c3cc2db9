"""Mixtures: one tree of several, in which nothing is judged twice and every part learns what it would alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from plait.claims.toy_laws import PROMPT, TableReader, chi_square, continuation, joint_law, random_table
from plait.decode import History, Sampler, Sampling
from plait.decode.speculate import RSDC, SPECULATORS, Context, Speculator, Tree
from plait.decode.speculate.mix import Union, merged
from plait.errors import ConfigError, IncompatibleError

SIZE = 4
TARGET, DRAFT = random_table(SIZE, 1), random_table(SIZE, 2)


def paths_of(tree: Tree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*paths[parent], token) if parent >= 0 else (token,))
    return paths


class Guess(Speculator):
    """Proposes random trees that are not drawn, and keeps what it is told."""

    def __init__(self, seed: int, size: int = 5) -> None:
        self.random = np.random.default_rng(seed)
        self.size = size
        self.told: list[tuple[Tree, Sequence[int], torch.Tensor]] = []

    def propose(self, context: Context) -> Tree:
        size = min(self.size, context.budget)
        self.tree = Tree(
            [context.tokens[-1], *self.random.integers(0, SIZE, size).tolist()],
            [-1, *(int(self.random.integers(0, node)) for node in range(1, size + 1))],
        )
        return self.tree

    def observe(self, tokens: Sequence[int], tree: Tree, path: Sequence[int], logits: torch.Tensor) -> None:
        self.told.append((tree, path, logits))


@pytest.mark.parametrize("seed", range(10))
def test_the_union_says_what_its_parts_say_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    context = Context([0, 1], 30, 100, Sampler(Sampling(), SIZE), History([0, 1]))
    trees = [Guess(int(random.integers(1000)), int(random.integers(0, 9))).propose(context) for _ in range(3)]
    union, places = merged(trees, 30)
    union.check(context, SIZE)
    found = paths_of(union)
    assert len(set(found)) == len(found)
    assert set(found) == {path for tree in trees for path in paths_of(tree)}
    for tree, nodes in zip(trees, places, strict=True):
        assert [found[node] for node in nodes] == paths_of(tree)
    small, _ = merged(trees, 3)
    assert len(small) == min(len(found), 4)
    small.check(context._replace(budget=3), SIZE)


def test_every_part_sees_its_own_nodes_first_and_what_others_added() -> None:
    parts = [Guess(1), Guess(2)]
    mix = Union(parts)
    context = Context([0, 1], 30, 100, Sampler(Sampling(), SIZE), History([0, 1]))
    tree = mix.propose(context)
    logits = torch.arange(len(tree) * SIZE, dtype=torch.float32).reshape(len(tree), SIZE)
    deepest = max(range(len(tree)), key=lambda node: tree.depths()[node])
    path = [deepest]
    while path[0]:
        path.insert(0, tree.parents[path[0]])
    mix.observe([0, 1, 2], tree, path, logits)
    for part in parts:
        (view, own_path, rows), proposed = part.told[0], part.tree
        assert view.tokens[: len(proposed)] == proposed.tokens
        assert view.parents[: len(proposed)] == proposed.parents
        assert set(paths_of(view)) == set(paths_of(tree))
        whole = {name: node for node, name in enumerate(paths_of(tree))}
        names = paths_of(view)
        assert [names[node] for node in own_path] == [paths_of(tree)[node] for node in path]
        for row, node in zip(rows, view.scored, strict=True):
            assert row.tolist() == logits[whole[names[node]]].tolist()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_drawn_and_other_guesses_together_keep_the_law(sampling: dict[str, Any]) -> None:
    found = []
    for seed in range(700):
        mix = Union([Guess(seed, 4), RSDC(branch=(2, 1)).guess_with(TableReader(DRAFT))])
        found.append(continuation(TARGET, Sampler(Sampling(**sampling, seed=seed), SIZE), mix.propose, 2)[0])
    assert chi_square(found, joint_law(TARGET, Sampling(**sampling), 2)) > 1e-4


def test_a_guess_that_says_what_a_drawn_sibling_says_is_that_sibling() -> None:
    law = torch.full((SIZE,), 1 / SIZE)
    drawn = Tree([1, 2, 3], [-1, 0, 0], frozenset({1, 2}), {0: law})
    union, _ = merged([Tree([1, 3, 0, 2], [-1, 0, 1, 0]), drawn], 30)
    assert union.tokens == [1, 2, 3, 0]
    assert union.parents == [-1, 0, 0, 2]
    assert union.drawn == {1, 2}
    assert list(union.laws) == [0]


def test_the_spec_names_the_parts_and_refuses_what_cannot_be_mixed() -> None:
    text = "mix:prompt-lookup:match=2+token-recycling:k=4,nodes=20+budget=9"
    mix = SPECULATORS.parse(text)
    assert str(mix) == text
    assert SPECULATORS.find("mix").from_json(mix.to_json()) == mix
    for wrong in (
        "mix",
        "mix:prompt-lookup",
        "mix:prompt-lookup+token-recycling+size=3",
        "mix:none+none+budget=0",
    ):
        with pytest.raises(ConfigError):
            SPECULATORS.parse(wrong)
    with pytest.raises(IncompatibleError, match="chain and rsd-s both draw"):
        SPECULATORS.parse("mix:chain:layers=1+rsd-s:layers=1")
    with pytest.raises(IncompatibleError, match="pearl cannot be part of a mix"):
        SPECULATORS.parse("mix:pearl:layers=1+prompt-lookup")


def test_greedy_tokens_stay_as_they_are() -> None:
    sampler = Sampler(Sampling(temperature=0.0), SIZE)
    plain = continuation(TARGET, sampler, lambda context: Tree.root(context.tokens[-1]), 30)[0]
    mix = Union([Guess(3), RSDC(branch=(2, 1)).guess_with(TableReader(DRAFT))])
    tokens, checks = continuation(TARGET, sampler, mix.propose, 30)
    assert (tokens, checks < 30) == (plain, True)
    assert PROMPT == (0, 1)
