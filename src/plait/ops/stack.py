"""The native form of matrices that are sums of blocks of signs and thin factors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from plait.ops.native import ExactMatrix, Projection, extension

__all__ = ["StackMatrix"]


class StackMatrix(ExactMatrix):
    """A sum of blocks; the tensors are borrowed, and must not change. Others may take their place.

    `matmul` rounds activations to 15 bits as `PackedMatrix` does; `matmul_exact` multiplies in fp32, and
    differs from `x @ unpack().T` by the rounding of fp32 sums only. Either gives a row the same bits in any batch.

    Args:
        shape: (O, I), I a multiple of 32.
        rank: columns of the factors, from 1 to 16.
        blocks: bytes of each, as `plait.weights.BlockStack` has them; at least one.
    """

    _exact = "stack_exact"

    def __init__(self, shape: tuple[int, int], rank: int, blocks: Sequence[Tensor]) -> None:
        self.handle = extension().StackMatrix(shape[0], shape[1], rank, list(blocks))
        self.shape = self.handle.shape
        self.rank, self._blocks = rank, list(blocks)
        self._whole = Projection([self])

    def __deepcopy__(self, memo: dict[int, Any]) -> StackMatrix:
        return StackMatrix(self.shape, self.rank, copy.deepcopy(self._blocks, memo))

    def hold(self, blocks: Sequence[Tensor]) -> None:
        """Be the sum of these blocks from the next product on; not while one is computed."""
        self._blocks = list(blocks)
        self.handle.hold(self._blocks)
