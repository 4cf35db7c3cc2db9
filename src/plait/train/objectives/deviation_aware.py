"""Deviation-aware distillation: listen more to tokens that the teacher itself is unsure of.

Chen et al. 2024, "DB-LLM", arXiv:2402.11960, section 3.2: models of few bits fall back on frequent tokens where the teacher's
law is broad. A token's distillation loss is weighted with u = H^gamma, H the entropy of the teacher's law; the paper's
numbers for gamma and the mix are not printed, so both are settings.

Shapes: N tokens, R predicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.train.data import Piece
from plait.train.objectives.distillation import Distillation

__all__ = ["DeviationAware"]


@dataclass(frozen=True, kw_only=True)
class DeviationAware(Distillation, name="dad"):
    """Distillation in which a token counts `(1 + mix u) / (1 + mix)`, where u grows with the teacher's entropy.

    u is scaled to a mean of 1 in every batch, so settings do not change the size of steps. `gamma=0` is plain
    distillation.

    Args:
        gamma: power of the entropy.
        mix: weight of the weighted loss beside the plain one.
    """

    hard: Annotated[float, Field(ge=0, le=1)] = 0.0
    gamma: Annotated[float, Field(ge=0, le=8)] = 0.5
    mix: Annotated[float, Field(ge=0, le=1000)] = 1.0

    def token_weights(self, batch: Sequence[Piece], places: Tensor, weights: Tensor) -> Tensor:
        entropy = torch.cat([piece.notes["teacher_entropies"] for piece in batch])[places]
        if not torch.isfinite(entropy).all():
            raise ConfigError("The teacher's law of a token has no entropy: it is NaN. Use another teacher.")
        u = entropy.clamp(min=0) ** self.gamma
        mean = (u * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        return weights * (1 + self.mix * u / mean.clamp(min=1e-12)) / (1 + self.mix)
