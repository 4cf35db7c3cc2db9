"""BitStack: a matrix as a sum of blocks of about one bit a weight, and all blocks of a model in one order.

Wang et al. 2024, "BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments",
arXiv:2410.23918: what is left of a matrix is split into its signs and its magnitudes, the magnitudes are replaced
by the product of two thin factors, and what that leaves is split again (section 2.2). Blocks are sorted by how
much each helps, over the whole model (section 2.3), and as many are loaded as there is memory for.

Two things differ from the paper. Columns are weighted by the size of their inputs inside the second factor, where the
paper divides the norm in front; so every matrix is weighted, also one whose inputs nothing makes alone. And what is
taken off a matrix is the block as it is stored, in fp16, so that later blocks repair the rounding of earlier ones.

Shapes: O output rows, I input columns, K rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.spec import bytes_of
from plait.weights.coded import half
from plait.weights.format import Elastic, ModelRun, check_matrix
from plait.weights.stacked_blocks import (
    MAX_BLOCKS,
    MAX_RANK,
    BlockStack,
    SignedBlock,
    block_bytes,
    join_block,
)
from plait.weights.stats import Stats

__all__ = ["BitStack", "magnitudes", "signed_blocks"]

# Columns more than those of the result, and rounds, of the randomised decomposition.
_EXTRA, _ROUNDS = 6, 3


@dataclass(frozen=True, kw_only=True)
class BitStack(Elastic, name="bitstack"):
    """A stack of blocks of about one bit a weight, of which any number may be loaded.

    `plait quantize` writes the whole stack, `plait.load(..., weights="bitstack:budget=64MB")` reads the part that
    fits. Lossy: below about 3 bits a weight it keeps more than formats of codes do, above it less. A product makes
    every weight anew from signs and factors, which costs more than reading codes of the same size.

    Args:
        blocks: how many there are of each matrix.
        rank: columns of the factors; 0 chooses the largest, up to 16, whose bits are at most `overhead` for
            each weight.
        overhead: bits of factors for each weight and block, where `rank` is 0.
        scale: weight columns by the size of their inputs, or `none`.
        sort: what a block is worth: `fisher` by the fall of the error of the matrix's outputs, weighted with squared
            gradients of the loss (one backward pass); `error` by that error relative to the outputs; `ppl` by the
            loss of the model with and without it (one pass of the later layers for each block).
        budget: for loading: bytes of the whole model, such as `64MB` or `61MiB`; empty for no limit.
        bits: for loading: bits for each weight of the stack, with everything that is kept for them.

    Raises:
        ConfigError: both `budget` and `bits`; from `pack`, a weight that is not a matrix, not finite, or above what
            fp16 factors hold.
    """

    blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)] = 8
    rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = 0
    overhead: Annotated[float, Field(gt=0.0, le=4.0)] = 0.25
    scale: Literal["norms", "none"] = "norms"
    sort: Literal["fisher", "error", "ppl"] = "fisher"
    budget: str = ""
    bits: Annotated[float, Field(gt=0.0)] | None = None

    needs = frozenset({"norms"})
    packs_embeddings = False

    def check(self) -> None:
        if self.budget and self.bits is not None:
            raise ConfigError("BitStack takes budget or bits, not both. Leave one out.")
        if self.budget:
            bytes_of(self.budget)

    def rank_of(self, shape: tuple[int, int]) -> int:
        """Columns of the factors of a matrix of this shape."""
        if self.rank:
            return self.rank
        rows, columns = shape
        most = self.overhead * rows * columns / (16 * max(1, rows + columns))
        return max(1, min(MAX_RANK, math.floor(most)))

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Bits of the whole stack."""
        return 8 * self.blocks * block_bytes(shape, self.rank_of(shape)) / max(1, shape[0] * shape[1])

    def pack(self, weight: Tensor, stats: Stats | None = None) -> BlockStack:
        check_matrix(self.name, weight)
        if self.budget or self.bits is not None:
            raise ConfigError(
                "A file holds the whole stack; budget and bits say how much of it is loaded. Leave them out here."
            )
        if stats is None and self.scale == "norms":
            raise ConfigError(f"{self.name} needs calibration text, unless it is told scale=none.")
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{self.name} takes finite weights. The weight has NaN or infinite values.")
        sizes = torch.ones(weight.shape[1])
        if stats is not None and self.scale == "norms":
            sizes = stats.norm2.sqrt().float()
            # An input that is always zero is not to make its column free.
            sizes = sizes.clamp(min=max(1e-30, 1e-3 * float(sizes.max())))
            sizes = sizes / sizes.mean()
        shape = (weight.shape[0], weight.shape[1])
        rank = self.rank_of(shape)
        found = signed_blocks(weight.detach().float(), sizes, rank, self.blocks)
        return BlockStack(shape, rank, [join_block(block) for block in found], self.blocks)

    def stack_order(self, run: ModelRun) -> list[str]:
        """Matrices in the order in which their second and later blocks are stacked.

        Level after level, so that two matrices never differ by more than a block; within a level what gains most
        for each byte comes first. (The paper sorts by the loss alone.)
        """
        stacks = {name: packed for name, packed in run.matrices.items() if isinstance(packed, BlockStack)}
        gains = _loss_gains(run, stacks) if self.sort == "ppl" else _error_gains(run, stacks, self.sort)
        order: list[str] = []
        for level in range(1, self.blocks):
            worth = {name: gains[name][level] / stacks[name].block_bytes for name in stacks}
            # What cannot be told comes last.
            order += sorted(stacks, key=lambda name: -worth[name] if math.isfinite(worth[name]) else math.inf)
        return order


def signed_blocks(weight: Tensor, sizes: Tensor, rank: int, count: int) -> list[SignedBlock]:
    """Iterative absolute value decomposition of a matrix (O, I), fp32, whose columns are weighted by `sizes` (I,).

    Block i holds the signs of what is left, `R`, and factors whose product is near `|R|`; `R` then loses the
    block as it is stored. Neither rounds nor blocks ever raise the weighted error.
    """
    rest = weight * sizes
    blocks = []
    for index in range(count):
        is_negative = rest < 0
        u, v = magnitudes(rest.abs(), rank, seed=index)
        block = SignedBlock(is_negative, half(u, "Factors"), half(v / sizes[:, None], "Factors"))
        left = rest - block.values() * sizes
        if left.square().sum() > rest.square().sum():
            # Nothing is left but the rounding of what was taken.
            block = SignedBlock(is_negative, torch.zeros_like(block.u), torch.zeros_like(block.v))
            left = rest
        blocks.append(block)
        rest = left
    return blocks


def magnitudes(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Thin factors (O, K) and (I, K) whose product is near a matrix (O, I): its largest singular vectors.

    By subspace iteration from random numbers of `seed` (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4); exactly
    where the matrix is small. Columns that the matrix has not the rank for are 0.
    """
    rows, columns = matrix.shape
    width = rank + _EXTRA
    if min(rows, columns) <= 2 * width:
        u, sizes, v_t = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        basis = matrix @ torch.randn(columns, width, generator=generator)
        for _ in range(_ROUNDS):
            basis = matrix.T @ torch.linalg.qr(basis).Q
            basis = matrix @ torch.linalg.qr(basis).Q
        q = torch.linalg.qr(basis).Q
        small, sizes, v_t = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ small
    found = min(rank, len(sizes))
    roots = sizes[:found].sqrt()
    left, right = matrix.new_zeros(rows, rank), matrix.new_zeros(columns, rank)
    left[:, :found], right[:, :found] = u[:, :found] * roots, v_t[:found].T * roots
    return left, right


def _error_gains(run: ModelRun, stacks: Mapping[str, BlockStack], sort: str) -> dict[str, list[float]]:
    """How much each block lowers the squared error of the outputs; what the whole stack is counts as exact."""
    gains = {}
    for name, (inputs, slopes) in run.sensitivity().items():
        if name not in stacks:
            continue
        weights = torch.outer(slopes, inputs) if sort == "fisher" else inputs.expand(stacks[name].shape)
        # Squared slopes may be too small for fp32, which is enough for their ratios.
        top = float(weights.max().clamp(min=1e-300))
        weights = (weights / top).float()
        missing = torch.zeros(stacks[name].shape)
        errors = [0.0]
        for part in reversed(stacks[name].parts()):
            missing += part.values()
            errors.insert(0, float((weights * missing.square()).sum(dtype=torch.float64)))
        scale = 1 / errors[0] if sort == "error" and errors[0] else top
        gains[name] = [(before - after) * scale for before, after in pairwise(errors)]
    return gains


def _loss_gains(run: ModelRun, stacks: Mapping[str, BlockStack]) -> dict[str, list[float]]:
    """How much each block lowers the loss of a model in which every matrix has the blocks below it."""
    whole = {name: stack.blocks for name, stack in stacks.items()}
    gains: dict[str, list[float]] = {name: [0.0] for name in stacks}
    for level in range(1, max(stack.depth for stack in stacks.values()) if stacks else 1):
        for name, stack in stacks.items():
            stack.hold(whole[name][:level])
        base = run.loss()
        for name, stack in stacks.items():
            stack.hold(whole[name][: level + 1])
            gains[name].append(base - run.loss(name))
            stack.hold(whole[name][:level])
    for name, stack in stacks.items():
        stack.hold(whole[name])
    return gains
