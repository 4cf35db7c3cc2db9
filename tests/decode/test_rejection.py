"""Rejection sampling: the outcome's law is exact, by enumeration, and known mistakes are noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.random import Generator, default_rng
from torch import Tensor

from plait.decode.speculate import Rejection
from plait.errors import ConfigError

SIZE = 5
# Sums of a few dozen products in float64.
ROUNDING = 1e-12

# The draws of a node with their probability, in the order in which they are declared.
Draws = Iterator[tuple[float, list[int]]]


def random_law(random: Generator, size: int = SIZE) -> Tensor:
    """A law in which some tokens are impossible and some are very likely."""
    weights = random.dirichlet(np.full(size, random.choice([0.2, 1.0, 5.0])))
    weights[random.random(size) < 0.2] = 0.0
    if weights.sum() == 0:
        weights[random.integers(size)] = 1.0
    return torch.from_numpy(weights / weights.sum())


def all_draws(law: Tensor, count: int, replacement: bool) -> Draws:
    """Every run of up to `count` draws from a law; fewer where no token is left."""
    if count == 0 or law.sum() <= 0:
        yield 1.0, []
        return
    law = law / law.sum()
    for token in torch.nonzero(law).flatten().tolist():
        rest = law.clone()
        if not replacement:
            rest[token] = 0.0
        for mass, tokens in all_draws(rest, count - 1, replacement):
            yield float(law[token]) * mass, [token, *tokens]


def outcome(
    target: Tensor, draft: Tensor, draws: Draws, *, replacement: bool, kind: type[Rejection] = Rejection
) -> Tensor:
    """Exact law of the token that comes out."""
    out = np.zeros(len(target))
    for mass, tokens in draws:
        rounds = kind(target, draft, replacement=replacement)
        for token in tokens:
            accepted = rounds.acceptance(token)
            out[token] += mass * accepted
            mass *= 1 - accepted
            rounds.reject(token)
        out += mass * rounds.target
    return torch.from_numpy(out)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_outcome_has_the_law_of_the_target(count: int, replacement: bool) -> None:
    random = default_rng(count)
    for _ in range(200 if count < 5 else 20):
        target, draft = random_law(random), random_law(random)
        out = outcome(target, draft, all_draws(draft, count, replacement), replacement=replacement)
        assert float((out - target).abs().max()) < ROUNDING


@pytest.mark.parametrize("replacement", [False, True])
def test_stopping_before_a_draw_is_made_keeps_the_law(replacement: bool) -> None:
    random = default_rng(1)
    for _ in range(100):
        target, draft = random_law(random), random_law(random)

        def some(law: Tensor = draft) -> Draws:
            # How many are drawn depends on the tokens drawn before, never on the next.
            for mass, tokens in all_draws(law, 3, replacement):
                stop = next((i for i, token in enumerate(tokens, 1) if token % 2), len(tokens))
                yield mass, tokens[:stop]

        out = outcome(target, draft, some(), replacement=replacement)
        assert float((out - target).abs().max()) < ROUNDING


def test_draws_without_replacement_are_accepted_more_often() -> None:
    random = default_rng(2)
    gains = []
    for _ in range(50):
        target, draft = (torch.from_numpy(random.dirichlet(np.full(SIZE, 0.5))) for _ in range(2))
        kept = []
        for replacement in (False, True):
            rejected = 0.0
            for mass, tokens in all_draws(draft, 3, replacement):
                rounds = Rejection(target, draft, replacement=replacement)
                for token in tokens:
                    mass *= 1 - rounds.acceptance(token)
                    rounds.reject(token)
                rejected += mass
            kept.append(1 - rejected)
        gains.append(kept[0] - kept[1])
    assert min(gains) > -ROUNDING
    assert np.mean(gains) > 0.02


def sorted_siblings(law: Tensor, count: int) -> Draws:
    for mass, tokens in all_draws(law, count, replacement=False):
        yield mass, sorted(tokens, key=lambda token: -float(law[token]))


def dropped_unlikely(law: Tensor, count: int) -> Draws:
    for mass, tokens in all_draws(law, count, replacement=False):
        yield mass, [token for token in tokens if law[token] > 0.15]


def likeliest(law: Tensor, count: int) -> Draws:
    yield 1.0, law.argsort(descending=True)[:count].tolist()


def best_of_more(law: Tensor, count: int) -> Draws:
    for mass, tokens in all_draws(law, count + 1, replacement=False):
        yield mass, sorted(tokens, key=lambda token: -float(law[token]))[:count]


@pytest.mark.parametrize("mistake", [sorted_siblings, dropped_unlikely, likeliest, best_of_more])
def test_a_false_declaration_of_draws_is_noticed(mistake: Callable[[Tensor, int], Draws]) -> None:
    target = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    draft = torch.tensor([0.6, 0.2, 0.1, 0.1], dtype=torch.float64)
    out = outcome(target, draft, mistake(draft, 2), replacement=False)
    assert float((out - target).abs().sum()) / 2 > 0.02


def test_draws_with_replacement_whose_duplicates_are_dropped_are_noticed() -> None:
    target = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    draft = torch.tensor([0.6, 0.2, 0.1, 0.1], dtype=torch.float64)
    kept = list(all_draws(draft, 3, replacement=True))
    out = outcome(target, draft, iter(kept), replacement=True)
    assert float((out - target).abs().max()) < ROUNDING
    dropped = ((mass, list(dict.fromkeys(tokens))) for mass, tokens in kept)
    out = outcome(target, draft, dropped, replacement=True)
    assert float((out - target).abs().sum()) / 2 > 0.005


class _Unnormalised(Rejection):
    """Forgets that the law of a later draw without replacement has to sum to 1."""

    def reject(self, token: int) -> None:
        residual = np.maximum(self.target - self.draft, 0.0)
        self.target = residual / residual.sum()
        self.draft = self.draft.copy()
        self.draft[token] = 0.0


class _SameLawAgain(Rejection):
    """Judges draws without replacement as if each had the first one's law."""

    def reject(self, token: int) -> None:
        residual = np.maximum(self.target - self.draft, 0.0)
        self.target = residual / residual.sum() if residual.sum() > 0 else self.target


@pytest.mark.parametrize("kind", [_Unnormalised, _SameLawAgain])
def test_the_wrong_law_of_later_draws_is_noticed(kind: type[Rejection]) -> None:
    target = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    draft = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    out = outcome(target, draft, all_draws(draft, 3, replacement=False), replacement=False, kind=kind)
    assert float((out - target).abs().sum()) / 2 > 0.02


def test_a_duplicate_of_a_rejected_draw_is_rejected_too() -> None:
    target, draft = torch.tensor([0.2, 0.8]), torch.tensor([0.9, 0.1])
    rounds = Rejection(target, draft, replacement=True)
    assert not rounds.accepts(0, 0.5)
    rounds.reject(0)
    assert not rounds.accepts(0, 0.0)


def test_equal_laws_always_accept_and_survive_a_rejection() -> None:
    law = torch.tensor([0.25, 0.25, 0.5])
    rounds = Rejection(law, law, replacement=False)
    assert rounds.accepts(2, 1 - 2**-53)
    rounds.reject(2)
    assert np.isfinite(rounds.target).all()
    assert rounds.target.sum() == pytest.approx(1)


def test_a_token_that_cannot_have_been_drawn_is_refused() -> None:
    law = torch.tensor([0.0, 0.5, 0.5])
    rounds = Rejection(law, law, replacement=False)
    with pytest.raises(ConfigError, match="token 0"):
        rounds.accepts(0, 0.5)
    rounds.reject(1)
    with pytest.raises(ConfigError, match="token 1"):
        rounds.accepts(1, 0.5)
