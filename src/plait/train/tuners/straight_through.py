"""Straight-through estimation: dense weights behind the codes are trained as if rounding did nothing.

Bengio et al. 2013, arXiv:1308.3432. With `latent=model,rate=0` it is how DB-LLM (arXiv:2402.11960) tunes its scales: planes
are chosen anew from the model's own weights whenever the scales have moved.

Shapes: O output rows, I input columns, N code groups of a matrix, W columns of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from plait.train.tuners.base import Tuner, by_group, latent_of, relative_step
from plait.weights import Tunable

__all__ = ["StraightThrough"]


@dataclass(frozen=True, kw_only=True)
class StraightThrough(Tuner, name="straight-through"):
    """Every step moves dense weights along the gradient of the packed ones, and rounds all of them anew.

    Costs 8 bytes for each weight while it runs. Codes flicker where weights lie between two levels.

    Args:
        rate: norm of a step relative to that of the matrix, where the learning rate is highest; 0 leaves the dense weights, whose codes then follow the
            numbers only.
        decay: of the squares of gradients.
        latent: the dense weights that it starts from: those of the packed model, or of the `model` that was packed.
            The latter forgets what calibration made of the codes.
    """

    rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    latent: Literal["packed", "model"] = "packed"

    def prepare(self, matrix: Tunable, original: Tensor | None) -> None:
        matrix.register_buffer("latent", latent_of(matrix, original, self.latent))
        if self.rate:
            matrix.register_buffer("squares", torch.zeros(matrix.shape))

    @torch.no_grad()
    def after_step(self, matrices: Mapping[str, Tunable], step: int, share: float = 1.0) -> int:
        changed = 0
        for matrix in matrices.values():
            if matrix.gradient is None:
                continue
            latent = matrix.get_buffer("latent")
            if self.rate:
                latent.sub_(relative_step(matrix, share * self.rate, self.decay, step))
            matrix.forget()
            groups = torch.arange(len(matrix.codes))
            codes = matrix.nearest(by_group(latent, matrix), groups)
            changed += int((codes != matrix.codes).any(dim=1).sum())
            matrix.codes.copy_(codes)
        return changed
