"""Predict the next token: what language models are made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plait.nn import Transformer
from plait.train.data import Piece
from plait.train.objectives.base import Loss, Objective, cross_entropy, mean_loss, predict

__all__ = ["NextToken"]


@dataclass(frozen=True, kw_only=True)
class NextToken(Objective, name="next-token"):
    """Cross-entropy of every token that counts, given the tokens of its piece before it."""

    def loss(self, model: Transformer, batch: Sequence[Piece], random: torch.Generator) -> Loss:
        found = predict(model, batch)
        value = mean_loss(cross_entropy(model.logits(found.hidden), found.wanted), found.weights)
        return Loss(value, {})
