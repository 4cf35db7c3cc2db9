"""Learn another model's law rather than its words: distillation on its likeliest tokens.

Source: Hinton et al. 2015, arXiv:1503.02531; for draft models, Zhou et al. 2024, arXiv:2310.08461.
Shapes: N tokens, R predicted tokens, K kept tokens of each law, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.nn import Transformer
from plait.train.data import Piece, TokenData
from plait.train.objectives.base import Loss, Objective, cross_entropy, mean_loss, predict

__all__ = ["Distillation", "Laws", "check_laws", "law_losses", "teacher_logits", "with_laws"]

_ROWS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective, name="distillation"):
    """Match the law of a teacher, which is kept as its `top` likeliest tokens at every place.

    The loss is the cross-entropy of the model under the teacher's kept probabilities, renormalised, mixed
    with that of the text itself. Keeping them costs 6 bytes for each of the `top`, once, before training.

    Args:
        top: tokens kept of each law.
        hard: weight of the text's own tokens, in [0, 1]; the teacher's law has the rest.
    """

    top: Annotated[int, Field(ge=1, le=1024)] = 32
    hard: Annotated[float, Field(ge=0, le=1)] = 0.1

    def annotate(self, data: TokenData, teacher: Transformer) -> TokenData:
        return with_laws(data, teacher, self.top)

    def token_weights(self, batch: Sequence[Piece], places: Tensor, weights: Tensor) -> Tensor:
        """How much each predicted token counts, (R,), where the data says `weights`.

        Args:
            places: (R,) indices of the tokens among those of the batch.
        """
        return weights

    def loss(self, model: Transformer, batch: Sequence[Piece], random: torch.Generator) -> Loss:
        check_laws(batch)
        found = predict(model, batch)
        logits = model.logits(found.hidden)
        soft_losses, has_law, best = law_losses(logits, batch, found.places)
        weights = self.token_weights(batch, found.places, found.weights * has_law)
        soft = mean_loss(soft_losses, weights)
        hard = mean_loss(cross_entropy(logits, found.wanted), found.weights)
        value = self.hard * hard + (1 - self.hard) * soft
        agree = (logits.argmax(dim=-1) == best).float().mean()
        return Loss(
            value,
            {"text": float(hard.detach()), "teacher": float(soft.detach()), "agreement": float(agree)},
        )


def with_laws(data: TokenData, teacher: Transformer, top: int) -> TokenData:
    """Data with the `top` likeliest tokens of a teacher's law of each token, their probabilities, and its entropy."""
    laws = Laws(len(data), min(top, teacher.config.vocab_size))
    for places, _, logits in teacher_logits(data, teacher):
        laws.add(places, logits)
    return data.with_notes(laws.notes)


def teacher_logits(data: TokenData, teacher: Transformer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The places (R,) of predicted tokens in the data, their ids (R,), and the logits (R, V), a piece at a time."""
    with torch.no_grad():
        for start, stop in data.pieces(_ROWS_AT_ONCE):
            found = predict(teacher, [data.piece(start, stop)])
            if len(found.places):
                yield start + found.places, found.wanted, teacher.logits(found.hidden)


class Laws:
    """A teacher's laws of the tokens of some data, as they are found.

    Args:
        count: tokens N.
        top: likeliest tokens K that are kept of each law.
    """

    def __init__(self, count: int, top: int) -> None:
        self.top = top
        self.notes = {
            "teacher_tokens": torch.zeros(count, top, dtype=torch.int32),
            "teacher_laws": torch.zeros(count, top, dtype=torch.float16),
            "teacher_entropies": torch.zeros(count),
        }

    def add(self, places: Tensor, logits: Tensor) -> None:
        """Note what predicts the tokens at `places` (R,): logits (R, V)."""
        best = logits.topk(self.top)
        self.notes["teacher_tokens"][places] = best.indices.int()
        self.notes["teacher_laws"][places] = best.values.softmax(dim=-1).half()
        self.notes["teacher_entropies"][places] = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


def check_laws(batch: Sequence[Piece]) -> None:
    """Raise `ConfigError` for data without laws."""
    if any("teacher_tokens" not in piece.notes for piece in batch):
        raise ConfigError("Distillation needs data that a teacher has annotated. Call annotate first.")


def law_losses(logits: Tensor, batch: Sequence[Piece], places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies (R,) under the teacher's laws, which tokens have one (R,), and its likeliest tokens (R,).

    Args:
        logits: (R, V), which predict the tokens at `places` (R,) among those of the batch.
    """
    tokens = torch.cat([piece.notes["teacher_tokens"] for piece in batch])[places].long()
    laws = torch.cat([piece.notes["teacher_laws"] for piece in batch])[places].float()
    own = logits.log_softmax(dim=-1).gather(1, tokens).masked_fill(laws == 0, 0.0)
    # The first tokens of later pieces of a long document have no law.
    return -(laws * own).sum(dim=-1), laws.sum(dim=-1) > 0, tokens[:, 0]
