"""PV-Tuning: codes follow the gradient too, few of them at a time and far enough to arrive somewhere.

Malinovskii et al. 2024, "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression", arXiv:2405.14852,
sections 3.2 and 3.3. The P step trains what codes stand for. The V step follows with the same gradient: of each
matrix, the code groups are taken whose dense weights the gradient would move most, and only those are encoded anew, from
where a long step would take them. A small subspace is what lets the step be long.

Shapes: O output rows, I input columns, N code groups of a matrix, W columns of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from plait.train.tuners.base import Tuner, by_group, latent_of, relative_step
from plait.weights import Tunable

__all__ = ["PV"]


@dataclass(frozen=True, kw_only=True)
class PV(Tuner, name="pv"):
    """The V step of PV-Tuning, on any packed form that is tuned.

    With `delta_decay=0`, the default and the authors' recommendation, steps add up in a buffer until they are worth a
    code; with 1, every step starts at the packed weights, which is the method of the paper's theory and needs batches of
    a hundred thousand tokens. Costs 8 bytes for each weight while it runs, 4 with `delta_decay=1`.

    Args:
        fraction: of the code groups of each matrix that may change in a step.
        trust: a step changes a matrix by at most this, relative to its norm, or by one group; 0 for no limit.
        rate: norm of the step of the dense weights, relative to that of the matrix, where the learning rate is highest.
        decay: of the squares of gradients.
        delta_decay: how much of the buffer is replaced by the packed weights after each step.
    """

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.01
    trust: Annotated[float, Field(ge=0, le=1)] = 0.01
    rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    delta_decay: Annotated[float, Field(ge=0, le=1)] = 0.0

    def prepare(self, matrix: Tunable, original: Tensor | None) -> None:
        matrix.register_buffer("squares", torch.zeros(matrix.shape))
        if self.delta_decay < 1:
            matrix.register_buffer("latent", latent_of(matrix, original, "packed"))

    @torch.no_grad()
    def after_step(self, matrices: Mapping[str, Tunable], step: int, share: float = 1.0) -> int:
        used = [matrix for matrix in matrices.values() if matrix.gradient is not None]
        return sum(self._chosen(matrix, step, share * self.rate) for matrix in used)

    def _chosen(self, matrix: Tunable, step: int, rate: float) -> int:
        present = by_group(matrix.dense(), matrix)
        move = by_group(relative_step(matrix, rate, self.decay, step), matrix)
        matrix.forget()
        if self.delta_decay < 1:
            latent = matrix.get_buffer("latent").view(-1, matrix.width)
            wanted = latent.sub_(move)
        else:
            wanted = present - move
        # The subspace: where the wanted weights are farthest from the packed ones.
        most = math.ceil(self.fraction * len(present))
        groups = (wanted - present).square().sum(dim=1).topk(most).indices
        codes = matrix.nearest(wanted[groups], groups)
        change = (matrix.decoded(codes, groups) - present[groups]).square().sum(dim=1)
        is_new = (codes != matrix.codes[groups]).any(dim=1)
        if self.trust:
            # From the largest on, as long as all together stay within the limit; the first in any case.
            within = change.cumsum(0) <= (self.trust * present.norm()) ** 2
            first = is_new & (is_new.cumsum(0) == 1)
            is_new &= within | first
        matrix.codes[groups[is_new]] = codes[is_new]
        if 0 < self.delta_decay < 1:
            latent.lerp_(by_group(matrix.dense(), matrix), self.delta_decay)
        return int(is_new.sum())
