"""The state of a recurrent layer composes, forks and refuses to forget single tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError
from plait.memory import LinearState, Memory, State

LOG_DECAY = torch.tensor([0.0, -0.1, -2.0], dtype=torch.float64)


def state_of(length: int, seed: int = 0) -> LinearState:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    return LinearState(LOG_DECAY, sums, length)


def assert_states_equal(one: LinearState, other: LinearState) -> None:
    assert len(one) == len(other)
    torch.testing.assert_close(one.sums, other.sums, atol=1e-12, rtol=1e-12)


def advanced(state: LinearState, num_tokens: int, seed: int) -> Tensor:
    sums = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    state.advance(sums, num_tokens)
    return sums


def test_it_is_a_state_and_a_memory_is_none() -> None:
    assert isinstance(state_of(3), State)
    assert not issubclass(Memory, State)


def test_compose_decays_the_earlier_state_by_the_tokens_of_the_later() -> None:
    a, b = state_of(7, seed=1), state_of(3, seed=2)
    both = a.compose(b)
    for head, log_decay in enumerate(LOG_DECAY):
        torch.testing.assert_close(
            both.sums[head], (3 * log_decay).exp() * a.sums[head] + b.sums[head], atol=1e-12, rtol=0
        )
    assert (len(both), len(a), len(b)) == (10, 7, 3)


def test_compose_is_associative_has_an_identity_and_is_not_commutative() -> None:
    a, b, c = state_of(7, seed=1), state_of(3, seed=2), state_of(20, seed=3)
    assert_states_equal(a.compose(b).compose(c), a.compose(b.compose(c)))
    nothing = LinearState.empty(LOG_DECAY, 4, 5)
    assert_states_equal(a.compose(nothing), a)
    assert_states_equal(nothing.compose(a), a)
    assert not torch.allclose(a.compose(b).sums, b.compose(a).sums)


def test_states_of_two_layers_do_not_compose() -> None:
    with pytest.raises(ConfigError, match=r"two states of one layer. Got shapes \(3, 4, 5\) and \(3, 2, 5\)"):
        state_of(2).compose(LinearState.empty(LOG_DECAY, 2, 5))


def test_a_fork_is_independent() -> None:
    state = state_of(5)
    twin = state.fork()
    before = twin.sums.clone()
    advanced(state, 2, seed=9)
    assert (len(state), len(twin)) == (7, 5)
    assert torch.equal(twin.sums, before)
    advanced(twin, 1, seed=10)
    assert len(state) == 7


def test_all_pending_rows_or_an_error() -> None:
    state = state_of(5)
    advanced(state, 1, seed=1)
    advanced(state, 2, seed=2)
    assert state.pending == 3
    for path in ([], [0, 1], [0, 2, 1], [0, 1, 2, 3]):
        with pytest.raises(IncompatibleError, match="state of linear-attention cannot leave out one of 3"):
            state.commit(path)
    assert state.pending == 3
    state.commit(torch.arange(3))
    assert (len(state), state.pending) == (8, 0)
    state.commit([])
    state.commit()


@pytest.mark.parametrize("length", [1, 4, 6, 7])
def test_going_back_by_single_tokens_is_refused(length: int) -> None:
    state = state_of(5)
    advanced(state, 3, seed=1)
    before = state.sums
    with pytest.raises(IncompatibleError, match=f"cannot go back from 8 tokens to {length}. Truncate to 0"):
        state.truncate(length)
    assert (len(state), state.pending) == (8, 3)
    assert state.sums is before


@pytest.mark.parametrize("length", [-1, 9])
def test_a_length_that_is_not_there_is_refused(length: int) -> None:
    state = state_of(8)
    with pytest.raises(ConfigError, match=f"truncate takes a length from 0 to 8. Got {length}"):
        state.truncate(length)


def test_going_back_to_the_start_the_last_commit_or_nowhere() -> None:
    state = state_of(5)
    committed = state.sums.clone()
    advanced(state, 1, seed=1)
    latest = advanced(state, 2, seed=2)
    state.truncate(8)
    assert torch.equal(state.sums, latest)
    state.truncate(5)
    assert (len(state), state.pending) == (5, 0)
    assert torch.equal(state.sums, committed)
    state.truncate(0)
    assert (len(state), state.pending) == (0, 0)
    assert torch.equal(state.sums, torch.zeros(3, 4, 5, dtype=torch.float64))


def test_bytes_do_not_grow_with_the_sequence() -> None:
    state = LinearState.empty(LOG_DECAY, 4, 5)
    one = 3 * 4 * 5 * 8
    assert state.nbytes() == one
    for seed in range(20):
        advanced(state, 50, seed)
        assert state.nbytes() == 2 * one
        state.commit()
        assert state.nbytes() == one
    assert len(state) == 1000


def test_what_is_remembered_carries_no_gradient() -> None:
    state = state_of(0)
    state.advance(torch.ones(3, 4, 5, requires_grad=True) * 2, 1)
    assert not state.sums.requires_grad
