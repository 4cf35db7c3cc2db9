"""Answers with and without drafts: their tokens, their forward passes, and whether they are the same."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from plait.decode import Sampling
    from plait.engine import LanguageModel
    from plait.nn import Transformer

__all__ = ["Answer", "answer", "answers", "same_up_to_ties", "with_draft"]

# Two logits as close as this may change places with the rounding of another number of rows.
_TIE = 1e-3


class Answer(NamedTuple):
    """Tokens of an answer, the forward passes that chose them, and the seconds from the first to the last."""

    tokens: list[int]
    passes: int
    seconds: float


def with_draft(lm: LanguageModel, draft: str, draft_model: Transformer | None = None) -> LanguageModel:
    """The same model, guessing with another draft, and draft model if it takes one, that has learned nothing yet."""
    from plait.decode.speculate import SPECULATORS

    twin = copy.copy(lm)
    twin.draft_model = draft_model
    twin.draft = SPECULATORS.parse(draft)
    return twin


def answer(
    lm: LanguageModel,
    prompt: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    *,
    ignore_end: bool = False,
) -> Answer:
    """Answer one prompt alone; reading the prompt counts as one pass and is not timed."""
    engine = lm.new_engine()
    sequence = engine.submit(
        lm.request(prompt, max_new_tokens=max_new_tokens, sampling=sampling, ignore_end=ignore_end)
    )
    passes, start = 0, time.perf_counter()
    for _, piece in engine.run():
        if not passes:
            start = time.perf_counter()
        passes += len(piece.choices) > 0
    return Answer(list(sequence.result().tokens), passes, time.perf_counter() - start)


def answers(lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers to prompts that run at the same time; the end token does not stop them."""
    engine = lm.new_engine()
    sequences = [
        engine.submit(lm.request(prompt, max_new_tokens=max_new_tokens, ignore_end=True))
        for prompt in prompts
    ]
    for _ in engine.run():
        pass
    return [list(sequence.result().tokens) for sequence in sequences]


def same_up_to_ties(lm: LanguageModel, prompt: Sequence[int], first: list[int], second: list[int]) -> bool:
    """Whether two greedy answers are equal, or part where the model's two best logits are a tie."""
    import torch

    from plait.memory import Rows

    place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if place is None:
        return len(first) == len(second)
    ids = torch.tensor([*prompt, *first[:place]])
    with torch.inference_mode():
        logits = lm.model.logits(lm.model(ids, Rows([(len(ids), 0)]))[-1:])[0]
    best = logits.topk(2)
    return {first[place], second[place]} == set(best.indices.tolist()) and bool(
        best.values[0] - best.values[1] < _TIE
    )
