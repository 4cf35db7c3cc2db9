"""The native form of matrices of vector codes, which are multiplied where they lie."""

from __future__ import annotations

from torch import Tensor

from plait.ops.native import ExactMatrix, Projection, extension

__all__ = ["AdditiveMatrix"]


class AdditiveMatrix(ExactMatrix):
    """A matrix whose runs of columns are sums of codebook entries; the tensors are borrowed, and must not change.

    Rows are made in fp32, a few at a time, in the cache. `matmul` rounds activations to 15 bits as `PackedMatrix` does;
    `matmul_exact` multiplies in fp32, and differs from `x @ unpack().T` by the rounding of fp32 sums only. Either gives a
    row the same bits in any batch.

    Args:
        shape: (O, I), I a multiple of 32.
        codes, books, scales: as `plait.weights.Additive` has them, runs of any length that cuts the columns.
    """

    _exact = "additive_exact"

    def __init__(self, shape: tuple[int, int], codes: Tensor, books: Tensor, scales: Tensor) -> None:
        self.handle = extension().AdditiveMatrix(shape[0], shape[1], codes, books, scales)
        self.shape = self.handle.shape
        self._whole = Projection([self])
