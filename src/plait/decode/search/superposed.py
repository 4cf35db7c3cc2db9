"""Superposed decoding: several drafts for the price of one forward pass a token.

Source: Shen et al. 2024, "Superposed Decoding", arXiv:2405.18400, section 3 and algorithm 1. The model is
fed the weighted sum of the drafts' last embeddings; its one law, sharpened for each draft by counts of
n-grams, extends all of them. Shapes: k drafts, m candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from plait.decode.gumbel import top
from plait.decode.ngrams import NgramCounts
from plait.decode.search.reading import read_prompt
from plait.errors import ConfigError
from plait.memory import MemoryPlan, Past, Rows
from plait.nn import Transformer
from plait.spec import Spec

__all__ = ["Draft", "Superposed", "superposed_drafts"]

# Nats that a draft pays for a token when n-grams know none of its candidates.
_UNKNOWN = 200.0


@dataclass(frozen=True, kw_only=True)
class Superposed(Spec):
    """How several short drafts are decoded at once.

    Approximate: a draft is not what the model would say to it alone, and drifts from it with its length;
    10 to 20 tokens are what it is for.

    Args:
        num_drafts: drafts k.
        num_candidates: likeliest tokens m that may extend a draft; at least k.
        alpha: weight of the n-grams against the model; not used without n-grams.
        temperature: divides the logits before they are scored.
    """

    num_drafts: Annotated[int, Field(ge=1, le=64)] = 3
    num_candidates: Annotated[int, Field(ge=1, le=1024)] = 9
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.54
    temperature: Annotated[float, Field(gt=0, le=100)] = 0.06

    def check(self) -> None:
        if self.num_candidates < self.num_drafts:
            raise ConfigError(
                "num_candidates must be at least num_drafts, or the first step has too few drafts. "
                f"Got {self.num_candidates} and {self.num_drafts}."
            )


class Draft(NamedTuple):
    """A draft.

    Attributes:
        tokens: ids, the end token included where there is one.
        score: sum of the scores of its tokens, comparable only within one call.
        logprob: sum of the model's log-probabilities in nats when the draft is read alone.
        ended: whether it ends with an end token.
    """

    tokens: tuple[int, ...]
    score: float
    logprob: float
    ended: bool


@torch.inference_mode()
def superposed_drafts(
    model: Transformer,
    plan: MemoryPlan,
    prompt: Sequence[int],
    settings: Superposed,
    *,
    max_new_tokens: int,
    end_tokens: AbstractSet[int] = frozenset(),
    ngrams: NgramCounts | None = None,
) -> list[Draft]:
    """Decode drafts together, then read each once to say how likely the model finds it.

    Args:
        model: the transformer.
        plan: how the one past is kept.
        prompt: token ids, at least one.
        settings: see `Superposed`.
        max_new_tokens: tokens of a draft that does not end.
        end_tokens: ids that end a draft.
        ngrams: counts over texts in the same token ids.

    Returns:
        At most k drafts, best score for each token first.

    Raises:
        ConfigError, CapacityError: as `plait.decode.search.beam_search`.
    """
    past, logits, steps = read_prompt(model, plan, prompt, max_new_tokens)
    first_law = logits.log_softmax(dim=-1)
    twin = past.fork()
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[tuple[int, ...], float]] = []
    for number in range(1, steps + 1):
        best, scores = _candidates(logits[0].numpy(), live, prompt, settings, ngrams)
        going: list[tuple[tuple[int, ...], float]] = []
        for place in top(scores.ravel(), 2 * settings.num_drafts).tolist():
            draft, column = divmod(place, len(best))
            tokens = (*live[draft][0], int(best[column]))
            extended = (tokens, float(scores[draft, column]))
            (finished if tokens[-1] in end_tokens else going).append(extended)
        finished = _best(finished, settings.num_drafts)
        live = going[: settings.num_drafts]
        if not live or number == steps:
            break
        logits = _feed(model, past, live)
    chosen = sorted([*live, *finished], key=lambda draft: -draft[1] / len(draft[0]))
    chosen = chosen[: settings.num_drafts]
    logprobs = _read_alone(model, twin, first_law, [tokens for tokens, _ in chosen])
    return [
        Draft(tokens, score, logprob, tokens[-1] in end_tokens)
        for (tokens, score), logprob in zip(chosen, logprobs, strict=True)
    ]


def _candidates(
    logits: npt.NDArray[np.float64],
    live: Sequence[tuple[tuple[int, ...], float]],
    prompt: Sequence[int],
    settings: Superposed,
    ngrams: NgramCounts | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The likeliest tokens (m,), and the score of each draft extended by each of them, (k, m)."""
    best = top(logits, settings.num_candidates)
    scaled = logits[best] / settings.temperature
    log_law = scaled - scaled.max()
    log_law -= np.log(np.exp(log_law).sum())
    scores = np.tile(log_law, (len(live), 1))
    if ngrams is not None and settings.alpha > 0:
        for row, (tokens, _) in enumerate(live):
            # Contexts may reach back into the prompt.
            shares = ngrams.mixture([*prompt[-5:], *tokens][-5:], best)
            with np.errstate(divide="ignore"):
                mixed = (1 - settings.alpha) * log_law + settings.alpha * np.log(shares)
            scores[row] = mixed if shares.any() else (1 - settings.alpha) * log_law - _UNKNOWN
    return best, scores + np.array([score for _, score in live])[:, None]


def _best(drafts: list[tuple[tuple[int, ...], float]], count: int) -> list[tuple[tuple[int, ...], float]]:
    return sorted(drafts, key=lambda draft: -draft[1] / len(draft[0]))[:count]


def _feed(model: Transformer, past: Past, live: Sequence[tuple[tuple[int, ...], float]]) -> Tensor:
    """Feed the superposition of the drafts' last tokens as one position; logits, (1, V) float64."""
    scores = torch.tensor([score for _, score in live], dtype=torch.float64)
    weights = scores.softmax(dim=0).float()
    rows = model.embed(torch.tensor([tokens[-1] for tokens, _ in live], dtype=torch.int64))
    mixed = (weights[:, None] * rows).sum(dim=0, keepdim=True)
    hidden = model(None, Rows([(1, len(past))]), [past], embeddings=mixed)
    past.commit()
    return model.logits(hidden).cpu().double()


def _read_alone(
    model: Transformer, past: Past, first_law: Tensor, drafts: Sequence[tuple[int, ...]]
) -> list[float]:
    """Log-probability of each draft, in one forward pass over forks of the prompt's past."""
    pasts = [past.fork() for _ in drafts]
    rows = Rows([(len(tokens), len(past)) for tokens in drafts])
    ids = torch.tensor([token for tokens in drafts for token in tokens], dtype=torch.int64)
    law = model.logits(model(ids, rows, pasts)).cpu().double().log_softmax(dim=-1)
    logprobs = []
    for tokens, segment in zip(drafts, rows.segments, strict=True):
        laws = torch.cat([first_law, law[segment.rows][:-1]])
        logprobs.append(float(laws[range(len(tokens)), list(tokens)].sum()))
    return logprobs
