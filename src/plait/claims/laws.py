"""What a session predicts, and how far two predictions are apart.

Shapes: N tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from plait.engine import LanguageModel
    from plait.memory import Past

__all__ = ["agreement", "divergence", "laws"]


def laws(lm: LanguageModel, past: Past, tokens: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """Natural log-probabilities (N, V) of every word at each place of a continuation.

    Args:
        past: of the tokens, or of the first of them; the last is read again. It is left as it is.
        tokens: what was read.
        continuation: N ids, each predicted with those before it in view.
    """
    import torch

    from plait.memory import Rows

    twin = past.fork()
    twin.truncate(min(len(twin), len(tokens) - 1))
    ids = torch.tensor([*tokens[len(twin) :], *continuation[:-1]], dtype=torch.int64)
    with torch.inference_mode():
        hidden = lm.model(ids, Rows([(len(ids), len(twin))]), [twin])
        return lm.model.logits(hidden[-len(continuation) :]).log_softmax(dim=-1)


def agreement(given: Tensor, wanted: Tensor) -> float:
    """Share of places at which two laws (N, V) have the same likeliest word."""
    return float((given.argmax(dim=-1) == wanted.argmax(dim=-1)).double().mean())


def divergence(given: Tensor, wanted: Tensor) -> float:
    """Mean Kullback-Leibler divergence of `given` from `wanted`, in nats."""
    return float((wanted.exp() * (wanted - given)).sum(dim=-1).double().mean())
