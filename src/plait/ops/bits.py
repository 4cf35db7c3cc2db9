"""Products of numbers that are -1 or 1, kept as one bit each: 64 of them for two operations on words.

A bit is set for -1. The product of two runs of n such numbers is n less twice the bits that differ, a whole number, so
every form gives the same bits in any order, any batch and on any machine.

Shapes: N rows, C numbers of a row, W words of 64 bits, O outputs, T tiles of 16 outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops import native

__all__ = [
    "WORD",
    "WORD_TILE",
    "binary_linear",
    "binary_product",
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


def binary_product(weight: Tensor, x: Tensor, columns: int, scales: Tensor) -> Tensor:
    """`scales * (x W^T)` for numbers that are -1 or 1, fp32 (N, O); exact but for the rounding of the one scale.

    Args:
        weight: words of W, (T, W, 16) int64; outputs beyond O have any.
        x: words of the rows, (N, W) int64.
        columns: how many numbers a row has; the bits beyond them must be 0 in both, wherever they lie.
        scales: (O,), fp32.
    """
    if native.module() is not None and all(t.device.type == "cpu" for t in (weight, x, scales)):
        y = torch.empty(x.shape[0], scales.shape[0])
        native.extension().binary_product(weight.contiguous(), x.contiguous(), columns, scales, y)
        return y
    rows = bits_of_words(weight.transpose(1, 2).reshape(-1, weight.shape[1])[: len(scales)])
    width = rows.shape[1]
    # Sums of at most 2^24 ones are exact in fp32.
    both = (1 - 2 * bits_of_words(x).float()) @ (1 - 2 * rows.float()).T
    return scales * (both - float(width - columns))


def binary_linear(weight: Tensor, x: Tensor, shift: Tensor | None, scales: Tensor) -> Tensor:
    """`binary_product` with `sign_words` of x + shift, in one call where it is native.

    Args:
        weight: (T, W, 16) int64; x: (N, C) fp32; shift: (C,) or None; scales: (O,) fp32.
    """
    if native.module() is not None and x.device.type == "cpu":
        y = torch.empty(x.shape[0], scales.shape[0])
        native.extension().binary_linear(weight, *_plain(x, shift), scales, y)
        return y
    return binary_product(weight, sign_words(x, shift), x.shape[1], scales)


def _plain(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Numbers in fp32, those of a row side by side, and their shift."""
    wide = x.detach().float()
    if x.shape[1] > 1 and wide.stride(1) != 1:
        wide = wide.contiguous()
    return wide, None if shift is None else shift.detach().float().contiguous()
