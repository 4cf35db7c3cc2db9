"""How well a model predicts texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plait.engine.prefill import ROWS_PER_PASS
from plait.errors import ConfigError
from plait.memory import Rows
from plait.memory.arrangements import pack
from plait.nn import Transformer

__all__ = ["Score", "nats_of_rows", "score_windows", "windows_of"]

# Rows of logits held at once while a text is scored: 256 rows of a 262,144 word vocabulary are 256 MB.
_SCORED_AT_ONCE = 256


class Score(NamedTuple):
    """How well a model predicts a text.

    Attributes:
        nats: sum of the negative log-probabilities of the predicted tokens.
        tokens: number of predicted tokens; the first of a window is not one, unless an earlier window
            holds it too.
        num_bytes: bytes of the whole text in UTF-8.
    """

    nats: float
    tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean over predicted tokens."""
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits needed for each byte of the text; comparable between tokenizers."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan


class Window(NamedTuple):
    """Part of a text: its tokens, and the row that predicts the first token that is scored."""

    ids: list[int]
    first: int


def windows_of(ids: list[int], context: int, stride: int) -> list[Window]:
    """Windows of `context` tokens that start `stride` apart, in which each token but the first is scored once.

    Raises:
        ConfigError: fewer than two tokens.
    """
    if len(ids) < 2:
        raise ConfigError(f"A text of at least 2 tokens is needed. Got {len(ids)}.")
    windows, scored = [], 1
    for start in range(0, len(ids), stride):
        stop = min(start + context, len(ids))
        # The row before the first token that no earlier window has scored predicts it; a window
        # that begins with that token has no such row.
        windows.append(Window(ids[start:stop], max(scored - 1, start) - start))
        scored = stop
        if stop == len(ids):
            break
    return windows


@torch.inference_mode()
def score_windows(model: Transformer, windows: Sequence[Window]) -> list[float]:
    """Negative log-probabilities of each window's scored tokens; windows share forward passes, unpadded."""
    nats = [0.0] * len(windows)
    lengths = [len(window.ids) for window in windows]
    for bin in pack(lengths, max([ROWS_PER_PASS, *lengths])):
        chosen = [windows[index] for index in bin]
        ids = torch.tensor([token for window in chosen for token in window.ids], dtype=torch.int64)
        rows = Rows([(len(window.ids), 0) for window in chosen])
        hidden = model(ids, rows)
        spans = [
            torch.arange(segment.start + window.first, segment.start + segment.length - 1)
            for segment, window in zip(rows.segments, chosen, strict=True)
        ]
        wanted = torch.cat(spans)
        parts = nats_of_rows(model, hidden[wanted], ids[wanted + 1]).split([len(span) for span in spans])
        for index, part in zip(bin, parts, strict=True):
            nats[index] = float(part.sum())
    return nats


def nats_of_rows(model: Transformer, hidden: Tensor, following: Tensor) -> Tensor:
    """Negative log-probability of the token behind each hidden row: (N, W) and (N,) -> (N,) float64."""
    nats = []
    for low in range(0, len(following), _SCORED_AT_ONCE):
        block = slice(low, low + _SCORED_AT_ONCE)
        law = model.logits(hidden[block]).log_softmax(dim=-1)
        nats.append(-law.gather(1, following[block, None])[:, 0].double())
    return torch.cat(nats) if nats else following.double()
