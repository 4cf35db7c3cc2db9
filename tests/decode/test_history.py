"""Histories: counts kept step by step equal counts made from the whole text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.decode import History
from plait.errors import ConfigError

ids = st.lists(st.integers(0, 40), max_size=60)
steps = st.lists(
    st.one_of(st.tuples(st.just("add"), ids), st.tuples(st.just("cut"), st.integers(0, 60))), max_size=12
)


def check(history: History, prompt: list[int], generated: list[int]) -> None:
    assert len(history) == len(prompt) + len(generated)
    assert history.generated == tuple(generated)
    tokens, counts, in_prompt = history.counts()
    assert len(set(tokens.tolist())) == len(tokens)
    assert {t: c for t, c in zip(tokens.tolist(), counts.tolist(), strict=True) if c} == Counter(generated)
    assert {t for t, inside in zip(tokens.tolist(), in_prompt.tolist(), strict=True) if inside} == set(prompt)


@given(prompt=ids, steps=steps)
def test_counts_equal_a_recount_after_any_steps(
    prompt: list[int], steps: list[tuple[str, list[int] | int]]
) -> None:
    history, generated = History(prompt), list[int]()
    for _, argument in steps:
        if isinstance(argument, list):
            history.extend(argument)
            generated += argument
        else:
            length = min(argument, len(generated))
            history.truncate(len(prompt) + length)
            generated = generated[:length]
        check(history, prompt, generated)


@given(prompt=ids, first=ids, second=ids)
def test_a_fork_shares_nothing_that_changes(prompt: list[int], first: list[int], second: list[int]) -> None:
    history = History(prompt, first)
    twin = history.fork()
    twin.extend(second)
    history.truncate(len(prompt))
    check(history, prompt, [])
    check(twin, prompt, first + second)


@pytest.mark.parametrize(
    "form", [list, tuple, iter, np.array, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)]
)
def test_ids_are_read_from_any_form(form: Callable[[list[int]], list[int]]) -> None:
    check(History(form([3, 1, 3]), form([7, 7])), [3, 1, 3], [7, 7])


@pytest.mark.parametrize(
    "wrong", [[-1], [2**31], [10**30], [1.0], [True], ["1"], [None], [0, 0.5], [float("nan")]]
)
def test_what_is_not_an_id_is_refused_and_nothing_is_added(wrong: list[int]) -> None:
    history = History([1], [2])
    with pytest.raises(ConfigError, match=r"^Token ids must be whole numbers in .* Got "):
        history.extend([5, *wrong])
    check(history, [1], [2])


@pytest.mark.parametrize(
    "wrong", [torch.tensor([0.5]), torch.tensor([[1, 2]]), torch.tensor(1), torch.tensor([True])]
)
def test_tensors_that_are_not_ids_in_one_dimension_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"^Token ids must be whole numbers in one dimension"):
        History(wrong)


@pytest.mark.parametrize(
    "wrong", [torch.tensor([3, -1]), np.array([2**40]), np.array([2**63], dtype=np.uint64)]
)
def test_tensors_with_ids_outside_the_range_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"^Token ids must be whole numbers in "):
        History(wrong)


@pytest.mark.parametrize("length", [-1, 1, 5])
def test_only_generated_tokens_can_be_cut(length: int) -> None:
    history = History([1, 2], [3, 4])
    with pytest.raises(ConfigError, match=f"can be cut to 2 to 4 tokens. Got {length}."):
        history.truncate(length)
    check(history, [1, 2], [3, 4])
