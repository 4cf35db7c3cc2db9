"""Beam search, and diverse beam search over groups of beams.

Source: Vijayakumar et al. 2018, "Diverse Beam Search", arXiv:1610.02424, algorithm 1. With one group it is
beam search as Hugging Face Transformers does it. Beams are forks of one memory: what they share is stored,
and read, once. Shapes: R live beams, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from plait.decode.gumbel import top
from plait.decode.search.diversity import DIVERSITIES, Diversity, Step
from plait.decode.search.reading import read_prompt
from plait.errors import ConfigError
from plait.memory import MemoryPlan, Past, Rows
from plait.nn import Transformer
from plait.spec import Spec

__all__ = ["BeamSearch", "Hypothesis", "beam_search"]


@dataclass(frozen=True, kw_only=True)
class BeamSearch(Spec):
    """How several continuations are searched for at once.

    With `num_groups` above 1 the beams are split into groups that choose one after the other at each step,
    and a group pays for repeating the groups before it; the first group is a beam search of its own.

    Args:
        num_beams: continuations that are kept at each step.
        num_groups: groups of equal size.
        diversity_penalty: weight of the diversity term, in nats for each repetition.
        diversity: what counts as a repetition: `hamming` (the same token at this step), `cumulative`
            (that, but less between texts that already differ), `ngram` (the same pair of tokens anywhere)
            or `embedding` (similar tokens at this step).
        length_penalty: exponent p of the final score, `sum / tokens**p`.
        early_stopping: end a group as soon as it has as many finished texts as beams; else it goes on
            while a live beam could still be better.
    """

    num_beams: Annotated[int, Field(ge=1, le=256)] = 4
    num_groups: Annotated[int, Field(ge=1, le=256)] = 1
    diversity_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    diversity: Diversity = "hamming"
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    early_stopping: bool = False

    def check(self) -> None:
        if self.num_beams % self.num_groups:
            raise ConfigError(
                f"num_beams must be a multiple of num_groups. Got {self.num_beams} and {self.num_groups}."
            )


class Hypothesis(NamedTuple):
    """A continuation that a search found.

    Attributes:
        tokens: ids, the end token included where there is one.
        logprob: sum of the model's log-probabilities, in nats.
        score: that sum with the diversity penalties, divided by the length to the length penalty.
        group: which group found it, from 0 on.
        ended: whether it ends with an end token, not at the limit of tokens.
    """

    tokens: tuple[int, ...]
    logprob: float
    score: float
    group: int
    ended: bool


@dataclass
class _Beam:
    """A live continuation: `total` is the sum with penalties, `logprob` without."""

    tokens: tuple[int, ...]
    total: float
    logprob: float
    past: Past


@dataclass
class _Group:
    """Beams that compete with each other, and the best texts that they finished."""

    live: list[_Beam]
    finished: list[Hypothesis] = field(default_factory=list)


@torch.inference_mode()
def beam_search(
    model: Transformer,
    plan: MemoryPlan,
    prompt: Sequence[int],
    settings: BeamSearch,
    *,
    max_new_tokens: int,
    end_tokens: AbstractSet[int] = frozenset(),
) -> list[Hypothesis]:
    """Search for likely continuations of a prompt.

    Args:
        model: the transformer.
        plan: how the past of each beam is kept.
        prompt: token ids, at least one.
        settings: see `BeamSearch`.
        max_new_tokens: most tokens of a continuation; fewer where the model's context ends.
        end_tokens: ids that end a continuation.

    Returns:
        At most `num_beams` continuations, group after group, best score first within each. There are
        fewer only where the vocabulary has no more to offer.

    Raises:
        ConfigError: an empty prompt, an id outside the vocabulary, or no token to generate.
        CapacityError: the prompt fills the model's context.
    """
    root, logits, steps = read_prompt(model, plan, prompt, max_new_tokens)
    pasts = [*(root.fork() for _ in range(settings.num_groups - 1)), root]
    groups = [_Group([_Beam((), 0.0, 0.0, past)]) for past in pasts]
    log_laws = logits.log_softmax(dim=-1).expand(len(groups), -1).numpy()
    embeddings = functools.cache(lambda: _unit_rows(model))
    for number in range(1, steps + 1):
        start = 0
        for index, group in enumerate(groups):
            own = log_laws[start : start + len(group.live)]
            start += len(group.live)
            if not group.live:
                continue
            earlier = [[beam.tokens for beam in other.live] for other in groups[:index]]
            step = Step([beam.tokens for beam in group.live], earlier, own.shape[1], embeddings)
            _advance(group, index, own, step, settings, end_tokens, is_last=number == steps)
        live = [beam for group in groups for beam in group.live]
        if not live:
            break
        log_laws = _forward(model, live)
    return [hypothesis for group in groups for hypothesis in group.finished]


def _advance(
    group: _Group,
    index: int,
    log_laws: npt.NDArray[np.float64],
    step: Step,
    settings: BeamSearch,
    end_tokens: AbstractSet[int],
    *,
    is_last: bool,
) -> None:
    """One step of one group: extend its beams, set the best aside that end, and keep the best that go on."""
    size = settings.num_beams // settings.num_groups
    totals = np.array([beam.total for beam in group.live])[:, None] + log_laws
    if step.earlier and settings.diversity_penalty:
        totals = totals + settings.diversity_penalty * DIVERSITIES[settings.diversity](step)
    # Even if every beam ends in every way it can, `size` candidates that go on are among these.
    best = top(totals.ravel(), size * max(2, 1 + len(end_tokens)))
    length = len(group.live[0].tokens) + 1
    chosen: list[tuple[int, _Beam]] = []
    for rank, (parent, token) in enumerate(zip(*np.divmod(best, step.vocab_size), strict=True)):
        before = group.live[int(parent)]
        tokens = (*before.tokens, int(token))
        total = float(totals[parent, token])
        logprob = before.logprob + float(log_laws[parent, token])
        ended = tokens[-1] in end_tokens
        if not ended and not is_last:
            if len(chosen) < size:
                chosen.append((int(parent), _Beam(tokens, total, logprob, before.past)))
        elif rank < size:
            score = total / length**settings.length_penalty
            group.finished.append(Hypothesis(tokens, logprob, score, index, ended))
    group.finished.sort(key=lambda hypothesis: -hypothesis.score)
    del group.finished[size:]
    if _is_done(group, chosen, size, length, settings):
        group.live = []
        return
    # The first child of a beam goes on with its memory, each other one with a fork of it.
    seen: set[int] = set()
    for parent, beam in chosen:
        if parent in seen:
            beam.past = group.live[parent].past.fork()
        seen.add(parent)
    group.live = [beam for _, beam in chosen]


def _is_done(
    group: _Group, chosen: Sequence[tuple[int, _Beam]], size: int, length: int, settings: BeamSearch
) -> bool:
    if not chosen:
        return True
    if len(group.finished) < size:
        return False
    return settings.early_stopping or (
        chosen[0][1].total / length**settings.length_penalty <= group.finished[-1].score
    )


def _forward(model: Transformer, live: Sequence[_Beam]) -> npt.NDArray[np.float64]:
    """Feed the last token of every beam; log-laws of what follows, (R, V)."""
    pasts = [beam.past for beam in live]
    tokens = torch.tensor([beam.tokens[-1] for beam in live], dtype=torch.int64)
    hidden = model(tokens, Rows([(1, len(past)) for past in pasts]), pasts)
    for past in pasts:
        past.commit()
    log_laws: npt.NDArray[np.float64] = model.logits(hidden).cpu().double().log_softmax(dim=-1).numpy()
    return log_laws


def _unit_rows(model: Transformer) -> npt.NDArray[np.float64]:
    rows = model.embed(torch.arange(model.config.vocab_size))
    unit: npt.NDArray[np.float64] = torch.nn.functional.normalize(rows.double(), dim=-1).cpu().numpy()
    return unit
