"""Constraints hold at every node: greedy, sampled and speculative decoding, whatever is guessed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from plait.decode import Sampling
from plait.engine import LanguageModel, Request
from plait.errors import ConfigError

Make = Callable[..., LanguageModel]
VOCABULARY = 257
DRAFTS = ["none", "prompt-lookup", "token-recycling", "chain:layers=1", "rsd-c:layers=1", "rsd-s:layers=1"]


class Turns:
    """Token number i of an answer must be i modulo 3; nothing else about it is fixed."""

    def __init__(self) -> None:
        self.histories: list[tuple[int, ...]] = []

    def start(self) -> Turns:
        return self

    def allowed(self, generated: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        self.histories.append(tuple(generated))
        if any(token % 3 != place % 3 for place, token in enumerate(generated)):
            return None
        return np.arange(VOCABULARY) % 3 == len(generated) % 3


def ask(lm: LanguageModel, constraint: Any, **sampling: Any) -> tuple[int, ...]:
    engine = lm.new_engine()
    sequence = engine.submit(
        Request(
            prompt=[65, 66, 67, 65, 66, 67],
            sampling=Sampling(**sampling),
            max_new_tokens=40,
            ignore_end=True,
            constraint=constraint,
        )
    )
    for _ in engine.run():
        pass
    return sequence.result().tokens


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_token_obeys_whatever_is_guessed(make_small: Make, draft: str, temperature: float) -> None:
    tokens = ask(make_small(draft=draft), Turns(), temperature=temperature, seed=5, repetition_penalty=1.2)
    assert len(tokens) == 40
    assert all(token % 3 == place % 3 for place, token in enumerate(tokens))
    free = ask(make_small(draft=draft), None, temperature=temperature, seed=5, repetition_penalty=1.2)
    assert any(token % 3 != place % 3 for place, token in enumerate(free))


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_answers_under_a_constraint_do_not_depend_on_the_draft(make_small: Make, draft: str) -> None:
    assert ask(make_small(draft=draft), Turns(), temperature=0) == ask(make_small(), Turns(), temperature=0)


def test_drafts_make_a_guide_go_back(make_small: Make) -> None:
    constraint = Turns()
    ask(make_small(draft="rsd-s:layers=1"), constraint, temperature=1, seed=5)
    lengths = [len(history) for history in constraint.histories]
    assert any(later < earlier for earlier, later in itertools.pairwise(lengths))


def test_a_constraint_that_bans_what_is_left_is_an_error_of_that_request(make_small: Make) -> None:
    banned = {token: -float("inf") for token in range(0, VOCABULARY, 3)}
    with pytest.raises(ConfigError, match="Bias, penalties and the constraint leave no possible token"):
        ask(make_small(), Turns(), temperature=0, logit_bias=banned)
