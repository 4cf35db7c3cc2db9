"""AWQ: columns that meet large inputs are made larger before rounding, and their inputs smaller.

Paper: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
MLSys 2024, arXiv:2306.00978, equations 4 and 5: factors s = mean|x|^a, a from a grid, by the error of the
outputs. The inputs are divided where they are made (a norm, or rows of the matrix before), so nothing
is computed at run time.

Shapes: O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from plait.weights.coded import Coded
from plait.weights.format import WeightFormat
from plait.weights.rounding import Bits, GridName, rounding
from plait.weights.stats import Stats
from plait.weights.uniform import Group

__all__ = ["AWQ"]


@dataclass(frozen=True, kw_only=True)
class AWQ(WeightFormat, name="awq"):
    """Round to nearest after columns were scaled by how large their inputs are on a calibration text.

    Kept as the grid is kept: `uniform`, `bitmod` with 3 or 4 bits, or `nf4` with 4. Where nothing before a matrix can be
    divided by the factors, it is rounded as it is: attention's output projection, and layers of models that
    normalise behind the sum.

    Args:
        bits: of a code.
        group: columns that share a scale; 0 for the whole row.
        grid: what the codes stand for, `uniform`, `bitmod` or `nf4`.
        steps: exponents a that are tried: 0, 1 / steps, 2 / steps, ... below 1.

    Raises:
        ConfigError: bits that the grid does not have; from `pack`, as the grid says.
    """

    bits: Bits = 4
    group: Group = 64
    grid: GridName = "uniform"
    steps: Annotated[int, Field(ge=1, le=100)] = 20

    needs = frozenset({"norms", "hessian"})
    packs_embeddings = False

    def check(self) -> None:
        rounding(type(self).__name__, self.grid, self.bits, self.group)

    @property
    def base(self) -> WeightFormat:
        """The format that rounds."""
        return rounding(type(self).__name__, self.grid, self.bits, self.group)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return self.base.bits_per_weight(shape)

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Coded:
        packed = self.base.pack(weight)
        assert isinstance(packed, Coded)
        return packed

    def input_factors(self, weights: Sequence[Tensor], stats: Stats) -> Tensor | None:
        """The factors with the least error of the outputs, of all matrices together."""
        sizes = stats.mean_abs.clamp(min=1e-8)
        hessian = stats.hessian
        best, best_factors = torch.inf, torch.ones(stats.columns)
        for step in range(self.steps):
            factors = sizes ** (step / self.steps)
            factors = (factors / (factors.max() * factors.min()).sqrt()).float()
            error = 0.0
            for weight in weights:
                change = (self.base.pack(weight * factors).unpack() / factors - weight).double()
                error += float(((change @ hessian) * change).sum())
            if error < best:
                best, best_factors = error, factors
        return best_factors
