"""Products of numbers that are -1 or 1, kept as one bit each: 64 of them for two operations on words.

A bit is set for -1. The product of two runs of n such numbers is n less twice the bits that differ, a whole number, so
every form gives the same bits in any order, any batch and on any machine.

Shapes: N rows, C numbers of a row, W words of 64 bits, O outputs, T tiles of 16 outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.ops import native

__all__ = [
    "WORD",
    "WORD_TILE",
    "BitMatrix",
    "bits_of_words",
    "sign_words",
    "words_of_bits",
]

WORD = 64  # bits of a word
WORD_TILE = 16  # outputs whose words lie side by side


def words_of_bits(bits: Tensor) -> Tensor:
    """Bits (..., C) as words (..., W), int64; bit i of a word is number i of its 64, and bits beyond C are 0."""
    count = bits.shape[-1]
    padded = torch.zeros(*bits.shape[:-1], -(-count // WORD) * WORD, dtype=torch.uint8)
    padded[..., :count] = bits
    by_byte = padded.view(*bits.shape[:-1], padded.shape[-1] // 8, 8) << torch.arange(8, dtype=torch.uint8)
    return by_byte.sum(dim=-1, dtype=torch.uint8).view(torch.int64)


def bits_of_words(words: Tensor) -> Tensor:
    """Words (..., W) as bits (..., 64 W), uint8; the inverse of `words_of_bits` where C is a multiple of 64."""
    by_byte = words.contiguous().view(torch.uint8)[..., None] >> torch.arange(8, dtype=torch.uint8)
    return (by_byte & 1).flatten(-2)


def sign_words(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """The signs of x + shift as words, (N, W) int64: a bit is set where the sum is below 0, or NaN.

    Args:
        x: (N, C), fp32.
        shift: (C,), fp32; None for 0.
    """
    if native.module() is not None and x.device.type == "cpu":
        words = torch.empty(x.shape[0], -(-x.shape[1] // WORD), dtype=torch.int64)
        native.extension().sign_words(*_plain(x, shift), words)
        return words
    return words_of_bits(~((x if shift is None else x + shift) >= 0))


class BitMatrix:
    """A matrix of numbers that are -1 or 1, with a scale for each row; the tensors are borrowed, and must not change.

    Args:
        weight: words of W, (T, W, 16) int64; outputs beyond O have any.
        columns: how many numbers a row has; the bits beyond them must be 0 here and in what it meets, wherever they lie.
        scales: (O,), fp32.
    """

    def __init__(self, weight: Tensor, columns: int, scales: Tensor) -> None:
        self.weight, self.columns, self.scales = weight.contiguous(), columns, scales.detach().contiguous()
        self.outputs = len(scales)
        is_native = native.module() is not None and weight.device.type == scales.device.type == "cpu"
        self._handle = native.extension().BitMatrix(self.weight, columns, self.scales) if is_native else None

    def __deepcopy__(self, memo: dict[int, Any]) -> BitMatrix:
        # It never changes, so a copy of what holds it can share it.
        return self

    def product(self, x: Tensor) -> Tensor:
        """`scales * (x W^T)` for rows as words, (N, W) int64: fp32 (N, O), exact but for the rounding of the one scale."""
        if self._handle is not None and x.device.type == "cpu":
            y = torch.empty(x.shape[0], self.outputs)
            self._handle.product(x.contiguous().numpy(), y.numpy())
            return y
        rows = bits_of_words(self.weight.transpose(1, 2).reshape(-1, self.weight.shape[1])[: self.outputs])
        # Sums of at most 2^24 ones are exact in fp32.
        both = (1 - 2 * bits_of_words(x).float()) @ (1 - 2 * rows.float()).T
        return self.scales * (both - float(rows.shape[1] - self.columns))

    def linear(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """`product` with `sign_words` of x + shift, in one call where it is native: x (N, C) fp32 and shift (C,) or None."""
        if self._handle is not None and x.device.type == "cpu":
            rows, by = _plain(x, shift)
            # numpy's arrays are handed over in a tenth of the time of torch's, which is that of a small product.
            y = np.empty((x.shape[0], self.outputs), dtype=np.float32)
            self._handle.linear(rows.numpy(), None if by is None else by.numpy(), y)
            return torch.from_numpy(y)
        return self.product(sign_words(x, shift))


def _plain(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Numbers in fp32, those of a row side by side, and their shift."""
    wide = x if x.dtype == torch.float32 and not x.requires_grad else x.detach().float()
    if x.shape[1] > 1 and wide.stride(1) != 1:
        wide = wide.contiguous()
    return wide, None if shift is None else shift.detach().float().contiguous()
