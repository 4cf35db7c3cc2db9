"""Laws: equal to Hugging Face's processors, to brute force, and sane for any logits at all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from plait.decode import History, Sampler, Sampling
from plait.errors import ConfigError, PlaitError

# Laws in float64: both sides round a few times per entry. In float32: exp and one division.
FLOAT64 = 1e-12
FLOAT32 = 2e-6

options = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.1, 5),
        "top_k": st.integers(1, 400),
        "top_p": st.floats(0.01, 0.999),
        "min_p": st.floats(0.001, 0.9),
        "repetition_penalty": st.floats(0.5, 2),
    },
)
# Hugging Face keeps its biases in float32.
hugging_face_biases = st.floats(-5, 5, width=32)
penalties = st.fixed_dictionaries(
    {}, optional={name: st.floats(-2, 2) for name in ("presence_penalty", "frequency_penalty")}
)


def random_logits(size: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=size) * scale)


def hugging_face_law(logits: Tensor, tokens: list[int], chosen: dict[str, Any]) -> Tensor:
    """Softmax after Hugging Face's processors in the order in which `generate` applies them."""
    chain = LogitsProcessorList()
    if "logit_bias" in chosen:
        chain.append(
            SequenceBiasLogitsProcessor([[[token], bias] for token, bias in chosen["logit_bias"].items()])
        )
    if "repetition_penalty" in chosen:
        chain.append(RepetitionPenaltyLogitsProcessor(chosen["repetition_penalty"]))
    if "temperature" in chosen:
        chain.append(TemperatureLogitsWarper(chosen["temperature"]))
    if "top_k" in chosen:
        chain.append(TopKLogitsWarper(chosen["top_k"]))
    if "top_p" in chosen:
        chain.append(TopPLogitsWarper(chosen["top_p"]))
    if "min_p" in chosen:
        chain.append(MinPLogitsWarper(chosen["min_p"]))
    scores = chain(torch.LongTensor([tokens]), logits[None].clone())
    return torch.softmax(scores[0], dim=-1)


@settings(max_examples=400, deadline=None)
@given(chosen=options, size=st.integers(2, 700), seed=st.integers(0, 10**6), data=st.data())
def test_any_combination_of_options_equals_hugging_face(
    chosen: dict[str, Any], size: int, seed: int, data: st.DataObject
) -> None:
    ids = st.lists(st.integers(0, size - 1), min_size=1, max_size=20)
    prompt, generated = data.draw(ids), data.draw(ids)
    if data.draw(st.booleans()):
        chosen = chosen | {
            "logit_bias": data.draw(
                st.dictionaries(st.integers(0, size - 1), hugging_face_biases, min_size=1)
            )
        }
    logits = random_logits(size, seed)
    law = Sampler(Sampling(**chosen), size).law(logits, History(prompt, generated))
    expected = hugging_face_law(logits, prompt + generated, chosen)
    assert law.dtype == torch.float64
    assert torch.equal(law > 0, expected > 0)
    torch.testing.assert_close(law, expected, rtol=FLOAT64 * 100, atol=FLOAT64)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.9999])
def test_nuclei_of_any_width_equal_hugging_face(temperature: float, top_p: float) -> None:
    # From a few tokens to nearly all of 9001: every size of the candidate set is met.
    chosen: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    logits = random_logits(9001, 0)
    law = Sampler(Sampling(**chosen), 9001).law(logits, History())
    torch.testing.assert_close(law, hugging_face_law(logits, [0], chosen), rtol=1e-10, atol=FLOAT64)


def test_some_nuclei_need_every_size_of_the_candidate_set() -> None:
    widths = []
    for temperature, top_p in [(0.3, 0.9), (1.0, 0.9), (5.0, 0.9999)]:
        law = Sampler(Sampling(temperature=temperature, top_p=top_p), 9001).law(
            random_logits(9001, 0), History()
        )
        widths.append(int((law > 0).sum()))
    assert widths[0] < 256 < widths[1] < 4096 < widths[2] < 9001


@settings(max_examples=200, deadline=None)
@given(chosen=penalties, repetition=st.floats(0.5, 2), seed=st.integers(0, 10**6), data=st.data())
def test_penalties_equal_their_definition_token_by_token(
    chosen: dict[str, Any], repetition: float, seed: int, data: st.DataObject
) -> None:
    size = 12
    ids = st.lists(st.integers(0, size - 1), max_size=20)
    prompt, generated = data.draw(ids), data.draw(ids)
    logits = random_logits(size, seed)
    expected = logits.tolist()
    for token in range(size):
        if token in prompt + generated:
            expected[token] *= repetition if expected[token] < 0 else 1 / repetition
        count = generated.count(token)
        expected[token] -= count * chosen.get("frequency_penalty", 0.0)
        expected[token] -= chosen.get("presence_penalty", 0.0) if count else 0.0
    law = Sampler(Sampling(repetition_penalty=repetition, **chosen), size).law(
        logits, History(prompt, generated)
    )
    torch.testing.assert_close(
        law, torch.softmax(torch.tensor(expected, dtype=torch.float64), -1), rtol=1e-10, atol=FLOAT64
    )


def test_presence_and_frequency_penalties_leave_the_prompt_alone() -> None:
    logits = random_logits(9, 1)
    sampler = Sampler(Sampling(presence_penalty=1.0, frequency_penalty=1.0), 9)
    neutral = Sampler(Sampling(), 9).law(logits, History())
    assert torch.equal(sampler.law(logits, History([1, 1, 2])), neutral)
    assert float(sampler.law(logits, History([1], [1]))[1]) < float(neutral[1])


def test_prompt_ids_beyond_the_vocabulary_are_left_out() -> None:
    logits = random_logits(9, 1)
    sampler = Sampler(Sampling(repetition_penalty=1.5, frequency_penalty=0.5), 9)
    assert torch.equal(
        sampler.law(logits, History([3, 9, 70_000], [2])), sampler.law(logits, History([3], [2]))
    )


def test_the_law_does_not_depend_on_how_the_history_was_built() -> None:
    logits = random_logits(50, 2)
    sampler = Sampler(Sampling(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1), 50)
    whole = History([4, 5], [6, 7, 7, 8])
    stepwise = History([4, 5], [6, 30])
    stepwise.truncate(3)
    for token in (7, 7, 8, 40):
        stepwise.append(token)
    stepwise.truncate(6)
    assert torch.equal(sampler.law(logits, whole), sampler.law(logits, stepwise))


@settings(deadline=None)
@given(
    levels=st.lists(st.integers(-3, 3), min_size=1, max_size=300),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.99),
)
def test_tied_logits_follow_brute_force(levels: list[int], top_k: int, top_p: float, min_p: float) -> None:
    kept = list(range(len(levels)))
    if top_k:
        bar = sorted(levels, reverse=True)[:top_k][-1]
        kept = [token for token in kept if levels[token] >= bar]
    weights = [math.exp(level) for level in levels]
    total = math.fsum(weights[token] for token in kept)
    before, nucleus = 0.0, []
    for token in sorted(kept, key=lambda token: (-levels[token], token)):
        assume(abs(before - top_p * total) > 1e-9 * total)
        if before < top_p * total:
            nucleus.append(token)
        before += weights[token]
    assume(all(abs(weights[token] - min_p * max(weights)) > 1e-9 for token in nucleus))
    kept = [token for token in nucleus if weights[token] >= min_p * max(weights)]
    law = Sampler(Sampling(top_k=top_k, top_p=top_p, min_p=min_p), len(levels)).law(
        torch.tensor(levels, dtype=torch.float64), History()
    )
    assert sorted(kept) == torch.nonzero(law)[:, 0].tolist()
    total = math.fsum(weights[token] for token in kept)
    assert law[kept].tolist() == pytest.approx([weights[token] / total for token in kept], rel=1e-12)


@pytest.mark.parametrize("size", [4, 2000])
def test_equal_tokens_are_kept_from_the_lowest_id_until_the_mass_is_reached(size: int) -> None:
    law = Sampler(Sampling(top_p=0.5), size).law(torch.full((size,), 1.5), History())
    assert torch.nonzero(law)[:, 0].tolist() == list(range(size // 2))


def test_a_token_exactly_at_the_min_p_fraction_is_kept() -> None:
    logits = torch.tensor([0.0, math.log(0.25), math.log(0.24)], dtype=torch.float64)
    law = Sampler(Sampling(min_p=0.25), 3).law(logits, History())
    assert law.tolist() == pytest.approx([0.8, 0.2, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_logits_give_float32_laws_of_their_values(dtype: torch.dtype) -> None:
    logits = random_logits(5003, 3).to(dtype)
    for sampling in (Sampling(), Sampling(top_k=50), Sampling(temperature=0.7, repetition_penalty=1.2)):
        sampler, history = Sampler(sampling, 5003), History([4], [5])
        law = sampler.law(logits, history)
        assert law.dtype == torch.float32
        expected = sampler.law(logits.double(), history)
        torch.testing.assert_close(law.double(), expected, rtol=20 * FLOAT32, atol=1e-12)
        assert abs(float(law.sum(dtype=torch.float64)) - 1) < FLOAT32


def test_greedy_laws_have_one_token_the_lowest_of_the_best() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, -1.0, 3.0])
    assert Sampler(Sampling(temperature=0), 5).law(logits, History()).tolist() == [0, 1, 0, 0, 0]
    banned = Sampling(temperature=0, logit_bias={1: -math.inf})
    assert Sampler(banned, 5).law(logits, History()).tolist() == [0, 0, 1, 0, 0]
    penalised = Sampling(temperature=0, frequency_penalty=1.0)
    assert Sampler(penalised, 5).law(logits, History([2], [1, 2])).tolist() == [0, 0, 0, 0, 1]


def test_infinite_logits_are_certain_and_share_equally() -> None:
    logits = torch.tensor([1.0, math.inf, 2.0, math.inf, -math.inf])
    for sampling in (Sampling(), Sampling(temperature=1e-300), Sampling(repetition_penalty=2, top_k=4)):
        assert Sampler(sampling, 5).law(logits, History([1, 2])).tolist() == [0, 0.5, 0, 0.5, 0]
    banned = Sampling(logit_bias={1: -math.inf})
    assert Sampler(banned, 5).law(logits, History()).tolist() == [0, 0, 0, 1, 0]


def test_a_law_never_changes_the_logits() -> None:
    logits = random_logits(40, 5)
    before = logits.clone()
    sampling = Sampling(logit_bias={1: 3, 2: -math.inf}, repetition_penalty=1.5, top_p=0.5, temperature=0.5)
    Sampler(sampling, 40).law(logits, History([3], [4]))
    Sampler(Sampling(), 40).law(logits, History())
    assert torch.equal(logits, before)


def test_a_law_has_the_same_bits_wherever_the_row_lies_in_memory() -> None:
    size = 1003
    logits = random_logits(size, 6).float()
    sampler = Sampler(Sampling(temperature=0.8, top_p=0.95), size)
    law = sampler.law(logits, History())
    for offset in range(17):
        moved = torch.zeros(size + 17)[offset : offset + size].copy_(logits)
        assert torch.equal(sampler.law(moved, History()), law)
    strided = torch.zeros(size, 3)[:, 1].copy_(logits)
    assert torch.equal(sampler.law(strided, History()), law)
    assert torch.equal(sampler.law(logits.clone().requires_grad_(), History()), law)


any_settings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.one_of(st.just(0.0), st.floats(0, 100)),
        "top_k": st.integers(0, 10**12),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1, exclude_max=True),
        "repetition_penalty": st.floats(0, 100, exclude_min=True),
        "presence_penalty": st.floats(-100, 100),
        "frequency_penalty": st.floats(-100, 100),
        "logit_bias": st.dictionaries(st.integers(0, 4), st.one_of(st.just(-math.inf), st.floats(-100, 100))),
        "logprobs": st.integers(0, 20),
    },
)


@settings(max_examples=1000, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False, width=32), min_size=5, max_size=40),
    chosen=any_settings,
    prompt=st.lists(st.integers(0, 39), max_size=8),
    generated=st.lists(st.integers(0, 39), max_size=8),
    double=st.booleans(),
)
def test_any_settings_on_any_logits_give_a_law_or_a_refusal(
    values: list[float], chosen: dict[str, Any], prompt: list[int], generated: list[int], double: bool
) -> None:
    logits = torch.tensor(values, dtype=torch.float64 if double else torch.float32)
    sampler = Sampler(Sampling(seed=1, **chosen), len(values))
    history = History(prompt, generated)
    impossible = {token for token, bias in chosen.get("logit_bias", {}).items() if bias == -math.inf}
    impossible |= {token for token, value in enumerate(values) if value == -math.inf}
    try:
        law = sampler.law(logits, history)
    except PlaitError:
        # A finite logit can be penalised beyond the range of its dtype only at the very edge of it.
        edge = torch.finfo(logits.dtype).max / 1e3
        assert all(value < -edge for token, value in enumerate(values) if token not in impossible)
        return
    assert ((law >= 0) & (law <= 1)).all()
    assert abs(float(law.sum()) - 1) < FLOAT32
    assert not law[sorted(impossible)].any()
    choice = sampler.choose(logits, history, len(history))
    assert law[choice.token] > 0
    for _, logprob in [(choice.token, choice.logprob), *choice.alternatives]:
        assert logprob is None or logprob <= FLOAT32


@pytest.mark.parametrize("size", [1, 2, 3, 7, 511, 512, 513, 1025, 2048])
def test_the_only_possible_token_is_chosen_whatever_the_vocabulary_size(size: int) -> None:
    for token in {0, size // 2, size - 1}:
        logits = torch.full((size,), -math.inf)
        logits[token] = -5.0
        for chosen in (
            {},
            {"temperature": 0},
            {"top_p": 0.5},
            {"top_k": 3},
            {"min_p": 0.5},
            {"presence_penalty": 1},
        ):
            sampler = Sampler(Sampling(seed=0, logprobs=20, **chosen), size)
            assert sampler.law(logits, History())[token] == 1
            choice = sampler.choose(logits, History(), 0)
            assert choice == (token, 0.0, ((token, 0.0),))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_impossible_logits_are_errors_that_name_the_position(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, logit_bias={2: -math.inf}), 4)
    history = History([1, 2, 3])
    broken = torch.tensor([0.0, 1.0, math.nan, math.inf])
    with pytest.raises(PlaitError, match=r"^The logits at position 3 are not numbers \(NaN at token 2\)\."):
        sampler.law(broken, history)
    with pytest.raises(PlaitError, match=r"^The logits at position 17 are not numbers"):
        sampler.choose(broken, history, 17)
    with pytest.raises(PlaitError, match=r"^All logits at position 3 are -inf"):
        sampler.law(torch.full((4,), -math.inf), history)
    with pytest.raises(ConfigError, match=r"^Bias and penalties leave no possible token at position 3\."):
        sampler.law(torch.tensor([-math.inf, -math.inf, 1.0, -math.inf]), history)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(5), torch.zeros(3), torch.zeros(0), torch.zeros(1, 4), torch.tensor(1.0)]
)
def test_logits_of_the_wrong_shape_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"This sampler takes 4 logits|one dimension"):
        Sampler(Sampling(), 4).law(wrong, History())


def test_logits_that_are_not_floating_point_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Logits must be floating-point numbers\. Got torch\.int64\."):
        Sampler(Sampling(), 4).law(torch.zeros(4, dtype=torch.long), History())
