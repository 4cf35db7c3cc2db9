"""What every objective offers: from a model and a batch to a loss.

Shapes: R predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.memory import Rows
from plait.nn import Transformer
from plait.spec import Axis, Spec
from plait.train.data import Piece, TokenData

__all__ = ["OBJECTIVES", "Loss", "Objective", "Predictions", "cross_entropy", "mean_loss", "predict"]

OBJECTIVES = Axis("objective")


class Loss(NamedTuple):
    """A loss to be minimised, and what it is made of.

    Attributes:
        value: scalar, nats a token, with gradient.
        parts: further numbers to watch, by name.
    """

    value: Tensor
    parts: dict[str, float]


class Objective(Spec, axis=OBJECTIVES):
    """What is learned; a value object.

    To add one: one file in `plait/train/objectives/` with a frozen dataclass that derives from this
    class, and one import in that folder's `__init__.py`.
    """

    def loss(self, model: Transformer, batch: Sequence[Piece], random: torch.Generator) -> Loss:
        """The loss of a batch.

        Args:
            model: in its parallel form; gradients flow to its parameters.
            batch: pieces of documents; none sees another.
            random: for whatever is drawn; the same for the same step of a run.
        """
        raise NotImplementedError

    def annotate(self, data: TokenData, teacher: Transformer) -> TokenData:
        """The data with what the objective must know of each token, found with the model before training."""
        return data


class Predictions(NamedTuple):
    """The tokens of a batch that are predicted.

    Attributes:
        hidden: (R, W) the rows that predict them.
        wanted: (R,) their ids.
        weights: (R,) how much each counts.
        places: (R,) their indices among the tokens of the batch.
    """

    hidden: Tensor
    wanted: Tensor
    weights: Tensor
    places: Tensor


def predict(model: Transformer, batch: Sequence[Piece]) -> Predictions:
    """One packed pass over the pieces; every token but the first of a piece is predicted, if it counts."""
    ids = torch.cat([piece.ids for piece in batch])
    weights = torch.cat([piece.weights for piece in batch]).clone()
    rows = Rows([(len(piece.ids), 0) for piece in batch])
    weights[[segment.start for segment in rows.segments if segment.length]] = 0
    places = weights.nonzero()[:, 0]
    hidden = model(ids, rows)
    return Predictions(hidden[places - 1], ids[places], weights[places], places)


def mean_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of losses (R,); 0 where nothing counts."""
    return (losses * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Negative log-probabilities (R,) of ids (R,) under logits (R, V)."""
    return F.cross_entropy(logits, wanted, reduction="none")
