"""One packed forward pass over what all sequences contribute, and how long such a pass takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from plait.decode.speculate import DraftBudget
from plait.engine.feed import Feed
from plait.memory import Causal, Mask, MemoryPlan, Past, Rows
from plait.nn import Transformer

__all__ = ["Timer", "forward", "one_torch_thread", "restored_on_failure"]

# Tokens before the rows whose pass is timed; how much longer it takes behind more is learnt as it happens.
_SHORT_PAST = 16


def forward(
    model: Transformer, feeds: Sequence[Feed], budget: DraftBudget, *, is_alone: bool = True
) -> Tensor:
    """Logits of the rows at which something is chosen: every scored node of every tree.

    A pass without pieces of prompts tells the budget how long it took, if no draft works beside it.
    """
    segments: list[tuple[int, int, Mask]] = []
    wanted: list[int] = []
    start = 0
    for feed in feeds:
        count = len(feed.tokens)
        segments.append((count, len(feed.past), feed.mask))
        if feed.tree is not None:
            wanted.extend(range(start + feed.lead, start + count))
        start += count
    tokens = torch.tensor([token for feed in feeds for token in feed.tokens], dtype=torch.int64)
    pasts = [feed.past for feed in feeds]
    begin = budget.clock()
    logits = model.answer(tokens, Rows(segments), pasts, wanted=torch.tensor(wanted, dtype=torch.int64))
    if len(wanted) == start and is_alone:
        budget.times.observe(start, budget.clock() - begin)
    return logits


class Timer:
    """Times forward passes behind a few tokens that have nothing to do with any sequence."""

    def __init__(self, model: Transformer, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._past: Past | None = None

    def __call__(self, rows: int) -> float:
        """Seconds of a pass over so many rows."""
        if self._past is None:
            self._past = self._model.new_past(MemoryPlan())
            tokens = torch.zeros(_SHORT_PAST, dtype=torch.int64)
            self._model(tokens, Rows([(_SHORT_PAST, 0)]), [self._past])
            self._past.commit()
        tokens = torch.zeros(rows, dtype=torch.int64)
        segments: list[tuple[int, int, Mask]] = [(rows, _SHORT_PAST, Causal())]
        start = self._clock()
        self._model.answer(tokens, Rows(segments), [self._past], wanted=torch.arange(rows))
        seconds = self._clock() - start
        self._past.truncate(_SHORT_PAST)
        return seconds


@contextlib.contextmanager
def restored_on_failure(pasts: Sequence[Past]) -> Iterator[None]:
    """Forget the rows of a forward pass that did not finish, also after Ctrl-C."""
    lengths = [len(past) for past in pasts]
    try:
        yield
    except BaseException:
        for past, length in zip(pasts, lengths, strict=True):
            past.truncate(length)
        raise


@contextlib.contextmanager
def one_torch_thread(model: Transformer) -> Iterator[None]:
    """Let torch use the calling thread alone where the model computes with threads of its own.

    Threads of torch go on spinning for milliseconds after an operation, on the processors that the model's need next.
    """
    threads = torch.get_num_threads()
    if model.program is None or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
