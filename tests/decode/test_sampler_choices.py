"""Choices: draws follow the law, log-probabilities are the model's, and batching changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.decode import Choice, History, Sampler, Sampling, Streams, choose_many, draw
from plait.errors import ConfigError, PlaitError

LAST_UNIFORM = 1 - 2**-53


def chi_square_limit(degrees: int) -> float:
    """Chi-square at p = 1e-3 (Wilson and Hilferty's approximation, within 1 % from 3 degrees on)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3


def chi_square(drawn: list[int], law: torch.Tensor) -> float:
    counts = np.bincount(drawn, minlength=len(law))
    expected = law.double().numpy() * len(drawn)
    assert not counts[expected == 0].any()
    possible = expected > 0
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {0: -math.inf, 1: 2},
    },
]


@pytest.mark.parametrize("chosen", SETTINGS)
def test_choices_follow_the_law(chosen: dict[str, Any]) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    history = History([2, 3], [3, 4])
    sampler = Sampler(Sampling(seed=11, **chosen), 12)
    law = sampler.law(logits, history)
    drawn = [sampler.choose(logits, history, position).token for position in range(10_000)]
    assert chi_square(drawn, law) < chi_square_limit(int((law > 0).sum()) - 1)


def test_draws_over_several_blocks_follow_the_law() -> None:
    law = torch.softmax(torch.randn(1300, generator=torch.Generator().manual_seed(1)), -1)
    streams = Streams(12)
    drawn = [draw(law, streams.uniform(position)) for position in range(40_000)]
    # 26 bins of 50 tokens, so that none expects few.
    bins = law.reshape(26, 50).sum(dim=1)
    assert chi_square([token // 50 for token in drawn], bins) < chi_square_limit(25)


def test_seeds_and_branches_draw_independently_at_one_position() -> None:
    logits = torch.zeros(5)
    law = torch.full((5,), 0.2)
    by_seed = [Sampler(Sampling(seed=seed), 5).choose(logits, History(), 3).token for seed in range(5_000)]
    by_branch = [
        Sampler(Sampling(seed=0), 5, branch=branch).choose(logits, History(), 3).token
        for branch in range(5_000)
    ]
    assert chi_square(by_seed, law) < chi_square_limit(4)
    assert chi_square(by_branch, law) < chi_square_limit(4)
    pairs = [5 * first + second for first, second in zip(by_seed, by_branch, strict=True)]
    assert chi_square(pairs, torch.full((25,), 0.04)) < chi_square_limit(24)


weights = st.lists(st.one_of(st.just(0.0), st.floats(0, 1, width=32)), min_size=1, max_size=1200).filter(
    lambda values: sum(values) > 1e-30
)


@settings(deadline=None)
@given(values=weights, uniform=st.one_of(st.just(0.0), st.just(LAST_UNIFORM), st.floats(0, LAST_UNIFORM)))
def test_a_draw_inverts_the_cumulative_distribution(values: list[float], uniform: float) -> None:
    token = draw(torch.tensor(values, dtype=torch.float64), uniform)
    assert values[token] > 0
    total = sum(map(Fraction, values))
    before = sum(map(Fraction, values[:token]))
    slack = total * Fraction(1, 10**12)
    assert before - slack <= Fraction(uniform) * total <= before + Fraction(values[token]) + slack


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 1024, 1500])
def test_the_extreme_uniforms_give_the_first_and_last_possible_token(size: int) -> None:
    for first, last in {(0, size - 1), (size // 3, size // 2)}:
        law = torch.zeros(size)
        law[first] = law[last] = 0.5
        assert draw(law, 0.0) == first
        assert draw(law, LAST_UNIFORM) == last


def test_rounding_of_sums_never_leads_to_an_impossible_last_token() -> None:
    # The sum of a block and its running sum round differently, so the largest uniform may pass the latter.
    for seed in range(200):
        law = torch.zeros(512, dtype=torch.float64)
        law[:300] = 0.01 + torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert draw(law, LAST_UNIFORM) == 299


def test_a_choice_is_the_draw_of_its_law_at_its_keyed_uniform() -> None:
    logits = torch.randn(700, generator=torch.Generator().manual_seed(2))
    sampler = Sampler(Sampling(seed=5, temperature=1.5, top_p=0.9), 700)
    for position in range(200):
        uniform = Streams(5).uniform(position, round=0, purpose="verify")
        expected = draw(sampler.law(logits, History()), uniform)
        assert sampler.choose(logits, History(), position).token == expected


@pytest.mark.parametrize("wrong", [-0.1, 1.0, math.nan, math.inf])
def test_a_uniform_outside_its_range_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match=r"^A draw needs a uniform in \[0, 1\)\. Got "):
        draw(torch.ones(3), wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3),
        torch.tensor([1.0, math.nan]),
        torch.tensor([math.inf, 1.0]),
        torch.zeros(0),
        torch.ones(2, 2),
    ],
)
def test_what_is_not_a_law_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"^A law "):
        draw(wrong, 0.5)


def test_reported_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(400, generator=torch.Generator().manual_seed(3)) * 4
    expected = torch.log_softmax(logits.double(), -1)
    # Warping moves the choice but not what is reported.
    sampling = Sampling(temperature=3.0, logit_bias={7: 100.0}, logprobs=6)
    choice = Sampler(sampling, 400).choose(logits, History(), 0)
    assert choice.token == 7
    assert choice.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    best = torch.topk(expected, 6)
    assert [each.token for each in choice.alternatives] == best.indices.tolist()
    assert [each.logprob for each in choice.alternatives] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_nothing_is_reported_unless_asked_for() -> None:
    logits = torch.tensor([0.0, 1.0])
    assert Sampler(Sampling(temperature=0), 2).choose(logits, History(), 0) == Choice(1, None, ())
    only = Sampler(Sampling(temperature=0, logprobs=0), 2).choose(logits, History(), 0)
    assert only.logprob == pytest.approx(-math.log(1 + math.exp(-1)))
    assert only.alternatives == ()


def test_tied_alternatives_are_in_order_of_id_and_impossible_ones_are_left_out() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, -math.inf, 0.0, 1.0])
    sampler = Sampler(Sampling(temperature=0, logprobs=20), 6)
    choice = sampler.choose(logits, History(), 0)
    assert [each.token for each in choice.alternatives] == [1, 2, 5, 0, 4]
    two = Sampler(Sampling(temperature=0, logprobs=2), 6).choose(logits, History(), 0)
    assert [each.token for each in two.alternatives] == [1, 2]


def test_infinite_logits_are_reported_as_sharing_certainty() -> None:
    logits = torch.tensor([5.0, math.inf, math.inf])
    choice = Sampler(Sampling(logprobs=3, seed=0), 3).choose(logits, History(), 0)
    assert choice.logprob == pytest.approx(-math.log(2))
    assert [each.token for each in choice.alternatives] == [1, 2]


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([None, {0: -math.inf, 1: 1.0}]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.sampled_from([None, 0, 4]),
)


@settings(max_examples=150, deadline=None)
@given(
    batch=st.lists(st.tuples(samplings, st.integers(0, 99)), min_size=1, max_size=6),
    size=st.sampled_from([2, 17, 600]),
    seed=st.integers(0, 10**6),
    layout=st.sampled_from(
        [torch.Tensor.contiguous, lambda rows: rows.T.contiguous().T, torch.Tensor.double]
    ),
)
def test_a_batch_gives_the_choices_of_its_rows_bit_for_bit(
    batch: list[tuple[Sampling, int]], size: int, seed: int, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    # Rounded, so that rows have ties.
    logits = layout(
        (torch.randn(len(batch), size, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4
    )
    samplers = [Sampler(sampling, size) for sampling, _ in batch]
    histories = [History([row % size], [1, 1, 0]) for row in range(len(batch))]
    positions = [position for _, position in batch]
    together = choose_many(logits, samplers, histories, positions)
    alone = [
        sampler.choose(row.clone(), history, position)
        for sampler, row, history, position in zip(samplers, logits, histories, positions, strict=True)
    ]
    assert together == alone
    backwards = choose_many(logits.flip(0), samplers[::-1], histories[::-1], positions[::-1])
    assert backwards == together[::-1]


def test_the_number_of_threads_changes_nothing() -> None:
    size = 70_001
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(4)) * 3
    samplers = [
        Sampler(Sampling(seed=1, logprobs=5), size),
        Sampler(Sampling(seed=2, top_p=0.9, logprobs=5), size),
    ]
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            laws = [sampler.law(row, History()) for sampler, row in zip(samplers, logits, strict=True)]
            outcomes.append((laws, choose_many(logits, samplers, [History()] * 2, [0, 1])))
    finally:
        torch.set_num_threads(threads)
    assert outcomes[0][1] == outcomes[1][1]
    assert all(
        torch.equal(first, second) for first, second in zip(outcomes[0][0], outcomes[1][0], strict=True)
    )


def test_greedy_ties_go_to_the_lowest_id_in_every_path() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [2.0, 2.0, 2.0], [0.0, 0.0, 2.0]])
    plain = Sampler(Sampling(temperature=0), 3)
    biased = Sampler(Sampling(temperature=0, logit_bias={0: 0.0}), 3)
    for samplers in ([plain] * 3, [biased] * 3, [plain, biased, plain]):
        choices = choose_many(logits, samplers, [History()] * 3, [0, 1, 2])
        assert [choice.token for choice in choices] == [1, 0, 2]


def test_one_bad_row_is_an_error_that_names_its_position() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = math.nan
    for temperature in (0.0, 1.0):
        samplers = [Sampler(Sampling(temperature=temperature), 4)] * 3
        with pytest.raises(
            PlaitError, match=r"^The logits at position 20 are not numbers \(NaN at token 2\)"
        ):
            choose_many(logits, samplers, [History()] * 3, [10, 20, 30])


def test_batches_whose_parts_do_not_fit_are_refused() -> None:
    sampler = Sampler(Sampling(), 4)
    assert choose_many(torch.zeros(0, 4), [], [], []) == []
    for logits, samplers, positions in [
        (torch.zeros(2, 4), [sampler], [0]),
        (torch.zeros(1, 4), [sampler], [0, 1]),
        (torch.zeros(4), [sampler] * 4, [0] * 4),
    ]:
        with pytest.raises(ConfigError, match=r"^choose_many takes \(B, V\) logits and B samplers"):
            choose_many(logits, samplers, [History()] * len(samplers), positions)
    with pytest.raises(ConfigError, match=r"^This sampler takes 4 logits\. Got 5"):
        choose_many(torch.zeros(1, 5), [sampler], [History()], [0])
