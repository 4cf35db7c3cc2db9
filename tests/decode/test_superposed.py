"""Superposed decoding and n-gram counts: equal to naive programs, one row and one pass for each token."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from plait.decode.ngrams import NgramCounts
from plait.decode.search import Superposed, superposed_drafts
from plait.errors import ConfigError
from plait.memory import MemoryPlan, Rows
from plait.nn import Transformer
from plait.nn.mixers import AttentionConfig
from plait.nn.rotary import RopeConfig
from small_models import small_transformer

SIZE = 23
WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)
# Rounding of fp32 logits, divided by the temperature.
NATS = 1e-2
FULL = MemoryPlan()


@pytest.fixture(scope="module")
def model() -> Transformer:
    mixer = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(theta=10000.0, dim=8))
    return small_transformer(
        mixer,
        mixer,
        seed=8,
        vocab_size=SIZE,
        width=16,
        inner=32,
        max_positions=128,
        embedding_scale=4.0,
        logit_scale=2.0,
    )


def shares(texts: list[list[int]], tokens: list[int], candidate: int) -> float:
    """The n-gram mixture by its definition, with dictionaries."""
    total = 0.0
    for length, weight in enumerate(WEIGHTS, start=1):
        followed: Counter[int] = Counter()
        for text in texts:
            for at in range(length, len(text)):
                if len(tokens) >= length and text[at - length : at] == tokens[-length:]:
                    followed[text[at]] += 1
        if followed:
            total += weight * followed[candidate] / followed.total()
    return total


def random_texts(seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 6, random.integers(0, 60)).tolist() for _ in range(4)]


@pytest.mark.parametrize("seed", range(10))
def test_the_mixture_is_that_of_its_definition(seed: int) -> None:
    texts = random_texts(seed)
    counts = NgramCounts(texts)
    candidates = np.arange(8)
    for text in [*texts, [], [7, 7], [99]]:
        for stop in range(0, len(text) + 1, 3):
            expected = [shares(texts, text[:stop], candidate) for candidate in range(8)]
            np.testing.assert_allclose(counts.mixture(text[:stop], candidates), expected, atol=1e-12)


def test_counts_of_nothing_and_bad_ids() -> None:
    assert not NgramCounts([]).mixture([1, 2], np.arange(3)).any()
    assert NgramCounts([[1, 2, 3]]).nbytes() > 0
    for bad in (-1, 2**31):
        with pytest.raises(ConfigError, match="Token ids"):
            NgramCounts([[1, bad]])


def naive(
    model: Transformer,
    prompt: list[int],
    settings: Superposed,
    steps: int,
    ends: set[int],
    texts: list[list[int]] | None,
) -> list[tuple[list[int], float]]:
    """Superposed decoding with lists, reading all embeddings anew for every token."""
    rows = model.embed(torch.tensor(prompt))
    drafts: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[list[int], float]] = []
    for _ in range(steps):
        with torch.inference_mode():
            hidden = model(None, Rows([(len(rows), 0)]), embeddings=rows)
            z = model.logits(hidden[-1:])[0].double()
        order = sorted(range(SIZE), key=lambda v: (-float(z[v]), v))[: settings.num_candidates]
        law = torch.softmax(z[order] / settings.temperature, 0).log().tolist()
        found = []
        for i, (tokens, score) in enumerate(drafts):
            known = [shares(texts, prompt + tokens, v) for v in order] if texts is not None else []
            for v, p, s in zip(order, law, known or [None] * len(order), strict=True):
                if s is None or settings.alpha == 0:
                    gain = p
                elif not any(known):
                    gain = (1 - settings.alpha) * p - 200
                elif s == 0:
                    continue
                else:
                    gain = (1 - settings.alpha) * p + settings.alpha * math.log(s)
                found.append((-(score + gain), i, order.index(v), [*tokens, v]))
        found.sort()
        best = [(tokens, -score) for score, _, _, tokens in found[: 2 * settings.num_drafts]]
        finished += [draft for draft in best if draft[0][-1] in ends]
        finished = sorted(finished, key=lambda d: -d[1] / len(d[0]))[: settings.num_drafts]
        drafts = [draft for draft in best if draft[0][-1] not in ends][: settings.num_drafts]
        if not drafts:
            break
        weights = torch.tensor([score for _, score in drafts], dtype=torch.float64).softmax(0)
        mixed = sum(
            float(w) * model.embed(torch.tensor([tokens[-1]]))
            for w, (tokens, _) in zip(weights, drafts, strict=True)
        )
        assert isinstance(mixed, torch.Tensor)
        rows = torch.cat([rows, mixed])
    return sorted([*drafts, *finished], key=lambda d: -d[1] / len(d[0]))[: settings.num_drafts]


@pytest.mark.parametrize("seed", range(24))
def test_drafts_equal_a_naive_program(model: Transformer, seed: int) -> None:
    random = np.random.default_rng(seed)
    k = int(random.integers(1, 5))
    settings = Superposed(
        num_drafts=k,
        num_candidates=k + int(random.integers(0, 8)),
        alpha=float(random.choice([0.0, 0.3, 0.54])),
        temperature=float(random.choice([0.3, 1.0, 2.0])),
    )
    prompt = random.integers(0, 6, 6).tolist()
    ends = set(random.integers(0, SIZE, int(random.integers(0, 3))).tolist())
    texts = random_texts(seed) if seed % 2 else None
    counts = NgramCounts(texts) if texts is not None else None
    found = superposed_drafts(model, FULL, prompt, settings, max_new_tokens=6, end_tokens=ends, ngrams=counts)
    expected = naive(model, prompt, settings, 6, ends, texts)
    assert [list(draft.tokens) for draft in found] == [tokens for tokens, _ in expected]
    assert len({draft.tokens for draft in found}) == len(found)
    for draft, (_, score) in zip(found, expected, strict=True):
        assert draft.score == pytest.approx(score, abs=NATS)
        assert draft.ended == (draft.tokens[-1] in ends)
        ids = torch.tensor([*prompt, *draft.tokens])
        with torch.inference_mode():
            law = model.logits(model(ids, Rows([(len(ids), 0)]))).double().log_softmax(-1)
        alone = float(law[range(5, len(ids) - 1), ids[6:]].sum())
        assert draft.logprob == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.06, 1.0])
def test_one_draft_is_greedy_decoding(model: Transformer, temperature: float) -> None:
    ids = [1, 2, 3]
    settings = Superposed(num_drafts=1, num_candidates=1, temperature=temperature)
    draft = superposed_drafts(model, FULL, ids, settings, max_new_tokens=10)[0]
    for _ in range(10):
        with torch.inference_mode():
            ids = [*ids, int(model.logits(model(torch.tensor(ids), Rows([(len(ids), 0)]))[-1:]).argmax())]
    assert list(draft.tokens) == ids[3:]


def test_every_token_of_all_drafts_is_one_row(model: Transformer) -> None:
    fed: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: fed.append(len(inputs[1])))
    drafts = superposed_drafts(model, FULL, [1, 2, 3], Superposed(num_drafts=4), max_new_tokens=5)
    hook.remove()
    # The prompt, a row for each further token, and the reading of four drafts at the end.
    assert fed == [3, 1, 1, 1, 1, 20]
    assert len(drafts) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_drafts": 4, "num_candidates": 3}, "3 and 4"),
        ({"num_drafts": 0}, "num_drafts"),
        ({"alpha": 1.0}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Superposed(**settings)
