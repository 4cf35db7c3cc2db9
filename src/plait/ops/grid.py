"""The native form of matrices of low-bit codes, which are multiplied where they lie."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from plait.ops.native import ExactMatrix, Projection, extension

__all__ = ["GridMatrix"]


class GridMatrix(ExactMatrix):
    """A matrix of 2-, 3-, 4- or 8-bit codes in tiles; the tensors are borrowed, and must not change.

    A weight is `scale * (code - zero)`, `scale * values[code]`, or the sum of a scale for each bit of its code that is set;
    see `plait.weights.coded`. `matmul`
    rounds activations to 15 bits as `PackedMatrix` does; `matmul_exact` multiplies in fp32, at about a
    third of the speed, and differs from `x @ unpack().T` by the rounding of fp32 sums only. Either
    gives a row the same bits in any batch.

    Args:
        shape: (O, I), I a multiple of 32.
        bits: of a code.
        group: columns of a group, a multiple of 32, or 0 for the whole row.
        codes, scales, zeros, types, row_scales: as `plait.weights.Coded` has them.
        values: what codes stand for; empty for `code - zero`.
        specials: the four values of the last code; empty for none.
        low_scales: of the low bits, where `scales` are those of the high ones.
    """

    _exact = "grid_exact"

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        group: int,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        types: Tensor | None,
        row_scales: Tensor | None,
        values: Sequence[int],
        specials: Sequence[int],
        low_scales: Tensor | None = None,
    ) -> None:
        self.handle = extension().GridMatrix(
            shape[0], shape[1], bits, group or shape[1], codes, scales, zeros, types, row_scales,
            list(values), list(specials), low_scales,
        )  # fmt: skip
        self.shape = self.handle.shape
        self._whole = Projection([self])
