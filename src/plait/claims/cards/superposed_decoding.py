"""Three drafts for about the price of one, at least as likely as three samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["CLAIM"]

_DRAFTS, _TOKENS, _PROMPT = 3, 10, 15


def _log_probability(lm: LanguageModel, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Mean log-probability of a continuation's tokens, in nats."""
    import torch

    from plait.memory import Rows

    ids = torch.tensor([*prompt, *tokens])
    with torch.inference_mode():
        hidden = lm.model(ids, Rows([(len(ids), 0)]))[len(prompt) - 1 : -1]
        law = lm.model.logits(hidden).double().log_softmax(dim=-1)
    return float(law.gather(1, ids[len(prompt) :, None]).mean())


def _measure(run: Run) -> Measurements:
    import statistics
    import time

    from plait.claims.drafts import answer
    from plait.claims.texts import other_manual, token_runs
    from plait.decode import Sampling
    from plait.engine import load

    yield "loading SmolLM2"
    lm = load("smollm2", weights="fp32")
    count = run.pick(20, 2)
    prompts = [passage[:_PROMPT] for passage in token_runs(lm.tokenizer, [60] * count)]
    yield "counting n-grams"
    # The prompts are from other chapters.
    ngrams = lm.count_ngrams(other_manual())
    nats: dict[str, list[float]] = {"nucleus": [], "superposed": [], "with_ngrams": []}
    best: list[float] = []
    ratios, distinct = [], []
    for number, prompt in enumerate(prompts):
        yield f"prompt {number + 1} of {count}"
        began = time.perf_counter()
        drafts = lm.suggest(prompt, num_drafts=_DRAFTS, max_new_tokens=_TOKENS, ngrams=ngrams)
        superposed = time.perf_counter() - began
        plain = lm.suggest(prompt, num_drafts=_DRAFTS, max_new_tokens=_TOKENS)
        began = time.perf_counter()
        samples = [
            answer(
                lm,
                prompt,
                Sampling(temperature=1.0, top_p=0.9, seed=run.seed + _DRAFTS * number + each),
                _TOKENS,
                ignore_end=True,
            )
            for each in range(_DRAFTS)
        ]
        ratios.append((time.perf_counter() - began) / superposed)
        distinct.append(len({draft.tokens for draft in drafts}))
        nats["superposed"] += [draft.logprob / len(draft.tokens) for draft in plain]
        nats["with_ngrams"] += [draft.logprob / len(draft.tokens) for draft in drafts]
        nats["nucleus"] += [_log_probability(lm, prompt, sample.tokens) for sample in samples]
        best.append(max(draft.logprob / len(draft.tokens) for draft in drafts))
    mean = {kind: statistics.fmean(values) for kind, values in nats.items()}
    return {
        "speed_ratio": Quantity.median(ratios, "x"),
        "nats_above_nucleus": Quantity(mean["with_ngrams"] - mean["nucleus"], "nats/token", samples=count),
        "nats_above_nucleus_without_ngrams": Quantity(
            mean["superposed"] - mean["nucleus"], "nats/token", samples=count
        ),
        "nats_gained_by_ngrams": Quantity(
            mean["with_ngrams"] - mean["superposed"], "nats/token", samples=count
        ),
        "best_draft": Quantity(statistics.fmean(best), "nats/token", samples=count),
        "distinct_drafts": Quantity(statistics.fmean(distinct), f"of {_DRAFTS}", samples=count),
    }


CLAIM = Claim(
    name="superposed-decoding",
    title="Several drafts for one pass a token",
    headline=(
        "Superposed decoding makes three drafts at least 2.44 times as fast as nucleus sampling, as coherent and as "
        "factual (Llama 2 7B, 10 tokens)."
    ),
    source="Shen et al. 2024, Superposed Decoding, arXiv:2405.18400",
    scale=(
        "SmolLM2-135M-Instruct in fp32, 20 prompts of 15 tokens of Python's manual, three drafts of 10 tokens, with and "
        "without n-grams of its other chapters; against three nucleus samples (p 0.9, temperature 1) one after the other, turn by turn "
        "in one process. The time of superposed drafts includes reading each once at the end."
    ),
    bars=(
        Bar(
            quantity="speed_ratio",
            relation=">=",
            value=2.2,
            unit="x",
            why="Three drafts share each pass; 3 would be ideal.",
        ),
        Bar(
            quantity="nats_above_nucleus",
            relation=">=",
            value=0.0,
            unit="nats/token",
            why="Drafts must be at least as likely, read alone, as samples are.",
        ),
        Bar(
            quantity="nats_gained_by_ngrams",
            relation=">=",
            value=0.0,
            unit="nats/token",
            why="N-grams are there to keep the drafts apart without making them worse.",
        ),
        Bar(
            quantity="distinct_drafts",
            relation=">=",
            value=3.0,
            unit="of 3",
            why="No two drafts can be the same text.",
        ),
    ),
    measure=_measure,
)
