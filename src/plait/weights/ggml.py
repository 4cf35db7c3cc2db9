"""The GGML block formats, rows of small blocks of codes and scales, and the plain floating types.

A block holds `elements` consecutive weights of one row in `nbytes` bytes, little-endian, scales in
fp16. The layouts are those of `ggml-quants.c` in llama.cpp; dequantised values are bit-equal to
its fp32 reference.

Shapes: O output rows, I input columns, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from plait import ops
from plait.errors import ConfigError, IncompatibleError, UnknownNameError, suggestion
from plait.weights.format import Dense, Packed, WeightFormat, check_matrix, take_tensors
from plait.weights.stats import Stats

__all__ = [
    "BF16",
    "BLOCK_FORMATS",
    "FP16",
    "FP32",
    "Q4_0",
    "Q4_1",
    "Q8_0",
    "BlockFormat",
    "Blocks",
    "dequantize",
]

# Weights decoded at a time: temporaries stay below 32 MB, yet threads seldom wait for each other.
_DECODE_CHUNK = 1 << 22


class BlockFormat(NamedTuple):
    """How one block is laid out.

    `decode(blocks, out)` reads uint8 (N, nbytes) and overwrites fp32 (N, elements).
    """

    name: str
    elements: int
    nbytes: int
    decode: Callable[[Tensor, Tensor], None]

    def row_nbytes(self, columns: int) -> int:
        """Bytes of a row of this many weights.

        Raises:
            ConfigError: the row is not a whole number of blocks.
        """
        if columns % self.elements:
            raise ConfigError(
                f"A matrix in {self.name} must have a multiple of {self.elements} columns. Got {columns}."
            )
        return columns // self.elements * self.nbytes

    def columns(self, row_nbytes: int) -> int:
        """Weights in a row of this many bytes.

        Raises:
            ConfigError: the row is not a whole number of blocks.
        """
        if row_nbytes % self.nbytes:
            raise ConfigError(
                f"A row in {self.name} must have a multiple of {self.nbytes} bytes. Got {row_nbytes}."
            )
        return row_nbytes // self.nbytes * self.elements


def dequantize(rows: Tensor, format: str) -> Tensor:
    """Rows of blocks as plain numbers.

    Args:
        rows: uint8, (..., bytes per row).
        format: a name in `BLOCK_FORMATS`.

    Returns:
        fp32, (..., I), on the device of `rows`.

    Raises:
        ConfigError: an unknown format, rows that are not bytes, or a partial block.
    """
    block = _block_format(format)
    if rows.dtype != torch.uint8:
        raise ConfigError(f"Blocks must be a tensor of uint8. Got {rows.dtype}.")
    out = torch.empty(
        (*rows.shape[:-1], block.columns(rows.shape[-1])), dtype=torch.float32, device=rows.device
    )
    blocks, weights = rows.reshape(-1, block.nbytes), out.view(-1, block.elements)
    step = _DECODE_CHUNK // block.elements
    for start in range(0, blocks.shape[0], step):
        block.decode(blocks[start : start + step], weights[start : start + step])
    return out


class Blocks(Packed, kind="ggml"):
    """A matrix kept in one of the GGML block formats, exactly as a GGUF file holds it.

    `unpack_rows` decodes only the rows that are asked for. `matmul` decodes at most 64 MB of the
    matrix at a time; it is exact for the decoded matrix, up to the rounding of `ops.linear`. In native form it
    keeps tiles of its codes in place of the blocks and is multiplied as `ops.PackedMatrix` says.

    Args:
        blocks: uint8, (O, bytes per row); kept without a copy, and never written.
        format: a name in `BLOCK_FORMATS`.

    Raises:
        ConfigError: an unknown format, blocks that are not a matrix of bytes, or a partial block.
    """

    blocks: Tensor | None

    def __init__(self, blocks: Tensor, format: str) -> None:
        if blocks.dim() != 2 or blocks.dtype != torch.uint8:
            raise ConfigError(
                f"Blocks must be a matrix of uint8. Got shape {tuple(blocks.shape)} of {blocks.dtype}."
            )
        super().__init__((blocks.shape[0], _block_format(format).columns(blocks.shape[1])), format)
        self.register_buffer("blocks", blocks)

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        """The chosen rows in fp32: (rows, I), or (*rows.shape, I) for a tensor of row numbers."""
        if self.native is not None:
            numbers = torch.arange(self.shape[0])[rows] if isinstance(rows, slice) else rows
            return self.native.unpack_rows(numbers)
        return dequantize(self._stored()[rows], self.format)

    @property
    def has_native_form(self) -> bool:
        return self.native is not None or ops.has_packed_form(self._stored(), self.format)

    def to_native(self) -> ops.PackedMatrix:
        if self.native is None:
            self.native = ops.PackedMatrix(self._stored(), self.format)
            self.blocks = None
        return self.native

    def matmul(self, x: Tensor) -> Tensor:
        if self.native is not None and not (torch.is_grad_enabled() and x.requires_grad):
            return self.native.matmul(x)
        return super().matmul(x)

    def select(self, rows: Tensor) -> Blocks:
        """A new matrix whose row i is row `rows[i]` of this one; nothing is decoded.

        Args:
            rows: int64, (rows of the new matrix,), each in [0, O).

        Raises:
            IncompatibleError: the matrix is in its native form.
        """
        return Blocks(self._stored()[rows], self.format)

    def tensors(self) -> dict[str, Tensor]:
        return {"blocks": self._stored()}

    def settings(self) -> dict[str, Any]:
        return {"format": self.format}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Self:
        block = _block_format(str(settings.get("format")))
        take_tensors(tensors, {"blocks": ((shape[0], block.row_nbytes(shape[1])), (torch.uint8,))})
        return cls(tensors["blocks"], block.name)

    def _stored(self) -> Tensor:
        if self.blocks is None:
            raise IncompatibleError(
                "A matrix in native form has no blocks left. Choose rows before to_native."
            )
        return self.blocks


# Decoding. Every decoder keeps one order of operations (scale times code, then the minimum), because
# each rounds once and the results are compared bit for bit.


def _fp16(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, as fp32 (N, 1)."""
    # The copy is aligned wherever the blocks start.
    number = blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format)
    return number.view(torch.float16).float()


def _fields(packed: Tensor, bits: int, width: int) -> Tensor:
    """Split bytes into codes of `bits` bits: uint8 (N, bytes) -> uint8 (N, bytes * 8 / bits).

    `width` consecutive bytes give `width` codes from their lowest bits, then `width` from the next
    bits, and so on; then the next `width` bytes follow.
    """
    groups = packed.reshape(packed.shape[0], -1, 1, width)
    mask = (1 << bits) - 1
    return torch.cat([(groups >> shift) & mask for shift in range(0, 8, bits)], dim=2).flatten(1)


def _plain(dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    def decode(blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks.clone(memory_format=torch.contiguous_format).view(dtype))

    return decode


def _decode_q4_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_fields(blocks[:, 2:], bits=4, width=16)).sub_(8).mul_(_fp16(blocks, 0))


def _decode_q4_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_fields(blocks[:, 4:], bits=4, width=16)).mul_(_fp16(blocks, 0)).add_(_fp16(blocks, 2))


def _five_bit_codes(fifth: Tensor, low: Tensor) -> Tensor:
    return _fields(low, bits=4, width=16) | (_fields(fifth, bits=1, width=1) << 4)


def _decode_q5_0(blocks: Tensor, out: Tensor) -> None:
    codes = _five_bit_codes(blocks[:, 2:6], blocks[:, 6:])
    out.copy_(codes).sub_(16).mul_(_fp16(blocks, 0))


def _decode_q5_1(blocks: Tensor, out: Tensor) -> None:
    codes = _five_bit_codes(blocks[:, 4:8], blocks[:, 8:])
    out.copy_(codes).mul_(_fp16(blocks, 0)).add_(_fp16(blocks, 2))


def _decode_q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_fp16(blocks, 0))


# The K formats: 256 weights in 8 or 16 groups, whose scales are themselves small integers.


def _scale_groups(out: Tensor, codes: Tensor, scales: Tensor, minima: Tensor | None = None) -> None:
    """`out = scale * code - minimum`, with one scale and minimum (N, groups) for each group."""
    grouped = out.copy_(codes).view(*scales.shape, -1).mul_(scales[..., None])
    if minima is not None:
        grouped.sub_(minima[..., None])


def _decode_q2_k(blocks: Tensor, out: Tensor) -> None:
    packed = blocks[:, :16]
    scales = _fp16(blocks, 80) * (packed & 15)
    minima = _fp16(blocks, 82) * (packed >> 4)
    _scale_groups(out, _fields(blocks[:, 16:80], bits=2, width=32), scales, minima)


def _decode_q3_k(blocks: Tensor, out: Tensor) -> None:
    low, high = _fields(blocks[:, 96:104], bits=4, width=8), _fields(blocks[:, 104:108], bits=2, width=4)
    scales = _fp16(blocks, 108) * ((low | (high << 4)).view(torch.int8) - 32)
    third = _fields(blocks[:, :32], bits=1, width=32)
    codes = _fields(blocks[:, 32:96], bits=2, width=32) | (third << 2)
    _scale_groups(out, codes.view(torch.int8) - 4, scales)


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima that Q4_K and Q5_K keep in 12 bytes, each times its fp16 factor."""
    first, second, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (last & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (last >> 4) | ((second >> 2) & 48)], dim=1)
    return _fp16(blocks, 0) * scales, _fp16(blocks, 2) * minima


def _decode_q4_k(blocks: Tensor, out: Tensor) -> None:
    _scale_groups(out, _fields(blocks[:, 16:], bits=4, width=32), *_six_bit_scales(blocks))


def _decode_q5_k(blocks: Tensor, out: Tensor) -> None:
    fifth = _fields(blocks[:, 16:48], bits=1, width=32)
    codes = _fields(blocks[:, 48:], bits=4, width=32) | (fifth << 4)
    _scale_groups(out, codes, *_six_bit_scales(blocks))


def _decode_q6_k(blocks: Tensor, out: Tensor) -> None:
    high = _fields(blocks[:, 128:192], bits=2, width=32)
    codes = _fields(blocks[:, :128], bits=4, width=64) | (high << 4)
    scales = _fp16(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    _scale_groups(out, codes.view(torch.int8) - 32, scales)


BLOCK_FORMATS = {
    block.name: block
    for block in (
        BlockFormat("f32", 1, 4, _plain(torch.float32)),
        BlockFormat("f16", 1, 2, _plain(torch.float16)),
        BlockFormat("bf16", 1, 2, _plain(torch.bfloat16)),
        BlockFormat("q4_0", 32, 18, _decode_q4_0),
        BlockFormat("q4_1", 32, 20, _decode_q4_1),
        BlockFormat("q5_0", 32, 22, _decode_q5_0),
        BlockFormat("q5_1", 32, 24, _decode_q5_1),
        BlockFormat("q8_0", 32, 34, _decode_q8_0),
        BlockFormat("q2_k", 256, 84, _decode_q2_k),
        BlockFormat("q3_k", 256, 110, _decode_q3_k),
        BlockFormat("q4_k", 256, 144, _decode_q4_k),
        BlockFormat("q5_k", 256, 176, _decode_q5_k),
        BlockFormat("q6_k", 256, 210, _decode_q6_k),
    )
}


def _block_format(name: str) -> BlockFormat:
    try:
        return BLOCK_FORMATS[name]
    except KeyError:
        raise UnknownNameError(
            f"Unknown block format {name!r}.{suggestion(name, BLOCK_FORMATS)}"
            f" Known: {', '.join(BLOCK_FORMATS)}."
        ) from None


# Packing, to the nearest code, bit-equal to the fp32 reference of ggml.


class _Quantized(WeightFormat):
    """Packs to `Blocks` of the format with the same name."""

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return 8 * BLOCK_FORMATS[self.name].row_nbytes(shape[1]) / max(1, shape[1])

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Blocks:
        check_matrix(self.name, weight)
        block = BLOCK_FORMATS[self.name]
        packed = torch.empty(
            (weight.shape[0], block.row_nbytes(weight.shape[1])), dtype=torch.uint8, device=weight.device
        )
        groups, blocks = weight.detach().reshape(-1, block.elements), packed.view(-1, block.nbytes)
        step = _DECODE_CHUNK // block.elements
        for start in range(0, groups.shape[0], step):
            scales, codes = self.encode(groups[start : start + step].float())
            if not torch.isfinite(scales).all():
                raise ConfigError(
                    f"{self.name} keeps scales in fp16, up to 65504."
                    " The weight has NaN, infinite or larger values."
                )
            blocks[start : start + step] = torch.cat([scales.view(torch.uint8), codes], dim=1)
        return Blocks(packed, self.name)

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 (N, elements) to the fp16 numbers (N, 1 or 2) and the bytes of codes of each block."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Q8_0(_Quantized, name="q8_0"):  # noqa: N801
    """8-bit codes in [-127, 127] and one fp16 scale for each 32 weights; 8.5 bits a weight.

    Unpacking is within half a scale of the weight, plus the rounding of the scale to fp16.

    Raises:
        ConfigError: from `pack` and `bits_per_weight`, columns that are not a multiple of 32; from `pack`,
            a weight that is not a matrix, or values that are not finite or above 65504 * 127.
    """

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        scale = groups.abs().amax(dim=1, keepdim=True) / 127
        exact = groups * _inverse(scale)
        size = exact.abs()
        whole = size.floor()
        # Halves are rounded away from zero.
        codes = exact.sign() * (whole + (2 * (size - whole)).floor())
        return scale.half(), codes.to(torch.int8).view(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Q4_0(_Quantized, name="q4_0"):  # noqa: N801
    """4-bit codes in [-8, 7] and one fp16 scale for each 32 weights; 4.5 bits a weight.

    The weight of largest magnitude becomes code -8. Unpacking is within half a scale of the weight,
    or a whole scale for weights near that magnitude with the other sign, plus the rounding of the
    scale to fp16.

    Raises:
        ConfigError: from `pack` and `bits_per_weight`, columns that are not a multiple of 32; from `pack`,
            a weight that is not a matrix, or values that are not finite or above 65504 * 8.
    """

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        extreme = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
        scale = extreme / -8
        return scale.half(), _nibbles(groups * _inverse(scale) + 8.5)


@dataclass(frozen=True, kw_only=True)
class Q4_1(_Quantized, name="q4_1"):  # noqa: N801
    """4-bit codes in [0, 15], one fp16 scale and one fp16 minimum for each 32 weights; 5 bits a weight.

    Unpacking is within half a scale of the weight, plus the rounding of scale and minimum to fp16.

    Raises:
        ConfigError: from `pack` and `bits_per_weight`, columns that are not a multiple of 32; from `pack`,
            a weight that is not a matrix, or values that are not finite or above 65504.
    """

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        low, high = groups.aminmax(dim=1, keepdim=True)
        scale = (high - low) / 15
        return torch.cat([scale, low], dim=1).half(), _nibbles((groups - low) * _inverse(scale) + 0.5)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, or 0 where that is infinite: such a scale is 0 in fp16."""
    inverse = scale.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0)


def _nibbles(codes: Tensor) -> Tensor:
    """Cut (N, 32) numbers to 4 bits; weights i and i + 16 share byte i."""
    low, high = codes.trunc().clamp_(0, 15).to(torch.uint8).chunk(2, dim=1)
    return low | (high << 4)


class _Plain(WeightFormat):
    """Packs to `Dense` of one floating type."""

    dtype: ClassVar[torch.dtype]

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return self.dtype.itemsize * 8

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Dense:
        check_matrix(self.name, weight)
        packed = weight.detach().to(self.dtype)
        if packed.dtype != weight.dtype and not torch.isfinite(packed).all():
            raise ConfigError(
                f"{self.name} holds finite numbers up to {torch.finfo(self.dtype).max:.6g}."
                " The weight has NaN, infinite or larger values."
            )
        return Dense(packed)


@dataclass(frozen=True, kw_only=True)
class FP32(_Plain, name="fp32"):
    """32-bit floating point; a weight that already is fp32 is kept without a copy.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix, or not finite in this type.
    """

    dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class FP16(_Plain, name="fp16"):
    """16-bit floating point, 11 significant bits; a weight that already is fp16 is kept without a copy.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix, or not finite in this type.
    """

    dtype = torch.float16


@dataclass(frozen=True, kw_only=True)
class BF16(_Plain, name="bf16"):
    """Brain floating point, 8 significant bits; a weight that already is bf16 is kept without a copy.

    Raises:
        ConfigError: from `pack`, a weight that is not a matrix, or not finite in this type.
    """

    dtype = torch.bfloat16
