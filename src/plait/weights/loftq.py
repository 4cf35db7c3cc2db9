"""LoftQ: a matrix is packed so that a thin product beside it can make up for what packing loses.

Paper: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv:2310.08659,
Algorithm 1: Q = round(W - B A), then B A = the first R singular triplets of W - Q, in turns from B A = 0 on, for small ||W - Q - B A||.

The packed matrix is Q. The product is not kept here: it is found again from W and Q by an adapter that starts so,
`lora:start=loftq`, whatever format Q is in.

Shapes: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.weights.format import Packed, WeightFormat, check_matrix
from plait.weights.rounding import Bits, GridName, rounding
from plait.weights.stats import Stats
from plait.weights.uniform import Group

__all__ = ["LoftQ", "nearest_product"]


@dataclass(frozen=True, kw_only=True)
class LoftQ(WeightFormat, name="loftq"):
    """Codes for a model that a LoRA adapter will stand beside: what rounding loses is left where a low rank can reach it.

    Kept as its grid is. By itself it answers slightly worse than the grid; give it an adapter of the same rank that starts with
    the rest (`plait train adapter --method lora:rank=16,start=loftq --original MODEL`). Each round rounds the matrix and finds
    the eigenvectors of a square of its smaller side.

    Args:
        bits: of a code; 3 or 4 with `bitmod`, 4 with `nf4`.
        group: columns that share a scale; 0 for the whole row.
        grid: what the codes stand for, `uniform`, `bitmod` or `nf4`.
        rank: of the adapter, at most the smaller side of every matrix.
        rounds: how often the matrix is rounded; 1 is the grid by itself.

    Raises:
        ConfigError: bits that the grid does not have; from `pack`, a rank above a side of the matrix, and as the grid says.
    """

    bits: Bits = 2
    group: Group = 64
    grid: GridName = "uniform"
    rank: Annotated[int, Field(ge=1)] = 16
    rounds: Annotated[int, Field(ge=1, le=100)] = 5

    packs_embeddings = False

    def check(self) -> None:
        rounding(type(self).__name__, self.grid, self.bits, self.group)

    @property
    def base(self) -> WeightFormat:
        """The format that rounds."""
        return rounding(type(self).__name__, self.grid, self.bits, self.group)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return self.base.bits_per_weight(shape)

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Packed:
        check_matrix(self.name, weight)
        if self.rank > min(weight.shape):
            raise ConfigError(
                f"LoftQ.rank must be at most {min(weight.shape)}, the smaller side of a matrix of "
                f"{weight.shape[0]} x {weight.shape[1]}. Got {self.rank}."
            )
        weight = weight.detach().float()
        product, best, least = torch.zeros_like(weight), None, torch.inf
        for _ in range(self.rounds):
            packed = self.base.pack(weight - product)
            left = weight - packed.unpack()
            down, up = nearest_product(left, self.rank)
            product = up @ down
            error = float((left - product).double().square().sum())
            if error < least:
                best, least = packed, error
        return packed if best is None else best


def nearest_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A (R, I) and B (O, R), of like size, whose product B A comes nearest to a matrix (O, I); fp32.

    Costs 2 O I min(O, I) operations and the eigenvectors of a square of the smaller side, in fp64.
    """
    if matrix.shape[0] > matrix.shape[1]:
        down, up = nearest_product(matrix.T, rank)
        return up.T.contiguous(), down.T.contiguous()
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    # The largest last.
    sizes = squares[-rank:].clamp(min=0).sqrt().sqrt()
    left = vectors[:, -rank:]
    down = (left.T @ wide) / sizes.clamp(min=1e-30)[:, None]
    down = torch.where(sizes[:, None] > 0, down, 0.0)
    return down.float(), (left * sizes).float()
