"""Numbers as packed low-bit codes, each group with a scale and a minimum of its own.

Shapes: T tokens, C channels of all heads side by side, g numbers in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.errors import ConfigError
from plait.ops.coded import CodedNumbers, StoredNumbers, can_be_read

__all__ = ["LARGEST", "WIDTHS", "AffineCodes", "pack", "unpack"]

# Bits of one code.
WIDTHS = (2, 3, 4, 8)

# The largest number of fp16, in which scales and minima are kept.
LARGEST = torch.finfo(torch.float16).max


def pack(codes: Tensor, bits: int, axis: int = -1) -> Tensor:
    """Put codes side by side in bytes, the first in the lowest bits.

    Args:
        codes: uint8 numbers below 2^bits.
        bits: 2, 3, 4 or 8.
        axis: along which codes share bytes; its length n becomes `bits * ceil(n / 8)`.

    Raises:
        ConfigError: another number of bits.
    """
    _check_bits(bits)
    codes = codes.movedim(axis, -1)
    codes = F.pad(codes, (0, -codes.shape[-1] % 8))
    if bits == 3:
        eights = codes.unflatten(-1, (-1, 8)).int() << torch.arange(0, 24, 3, device=codes.device).int()
        words = eights.sum(-1, dtype=torch.int32)
        packed = ((words[..., None] >> torch.tensor([0, 8, 16], device=codes.device).int()) & 255).byte()
        packed = packed.flatten(-2)
    else:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
        packed = (codes.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)
    return packed.movedim(-1, axis).contiguous()


def unpack(packed: Tensor, bits: int, length: int, axis: int = -1) -> Tensor:
    """The codes, uint8, that were packed; `length` is their number along the axis.

    Raises:
        ConfigError: another number of bits than 2, 3, 4 or 8.
    """
    _check_bits(bits)
    packed = packed.movedim(axis, -1)
    if bits == 3:
        bytes_ = packed.unflatten(-1, (-1, 3)).int() << torch.tensor([0, 8, 16], device=packed.device).int()
        words = bytes_.sum(-1, dtype=torch.int32)
        codes = ((words[..., None] >> torch.arange(0, 24, 3, device=packed.device).int()) & 7).byte()
        codes = codes.flatten(-2)
    elif bits == 8:
        codes = packed
    else:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    return codes[..., :length].movedim(-1, axis)


def _check_bits(bits: int) -> None:
    if bits not in WIDTHS:
        raise ConfigError(f"Codes have 2, 3, 4 or 8 bits. Got {bits}.")


@dataclass(frozen=True, eq=False)
class AffineCodes:
    """A matrix (T, C) as `code * scale + minimum`, with a scale and a minimum for each group.

    A number is off by at most half a scale, plus the rounding of the product. A scale is
    `(largest - smallest) / (2^bits - 1)` of its group; the minimum is rounded down and the scale up to
    fp16, so that no number of the group lies outside the codes.

    Attributes:
        codes: (T, bits * ceil(C / 8)) bytes, packed along the channels.
        scale, minimum: fp16, (ceil(T / g), C) for groups along tokens, (T, C / g) for groups along channels.
        bits: 2, 3, 4 or 8.
        along: the axis of a group.
        group: numbers g in a group; the last group of tokens may be shorter.
        channels: C.
        skipped: tokens of the first group that were cut off.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    bits: int
    along: Literal["tokens", "channels"]
    group: int
    channels: int
    skipped: int = 0

    @classmethod
    def of(cls, matrix: Tensor, bits: int, along: Literal["tokens", "channels"], group: int) -> Self:
        """Quantise a matrix (T, C), T at least 1.

        Raises:
            ConfigError: another number of bits, a group of channels that does not divide C, or a number
                that is not finite or above 65,504 in size.
        """
        _check_bits(bits)
        matrix = matrix.float()
        num_tokens, channels = matrix.shape
        if along == "channels" and channels % group:
            raise ConfigError(f"A group of channels must divide their number {channels}. Got {group}.")
        # NaN compares as false, so it is refused too.
        if not bool((matrix.abs() <= LARGEST).all()):
            raise ConfigError("Only finite numbers up to 65,504 in size can be quantised. Got another one.")
        if along == "tokens":
            # A short last group repeats its last row, which changes neither end of its range.
            missing = -num_tokens % group
            whole = torch.cat([matrix, matrix[-1:].expand(missing, -1)]) if missing else matrix
            groups = whole.unflatten(0, (-1, group))
            smallest, largest = groups.amin(1), groups.amax(1)
        else:
            groups = matrix.unflatten(1, (-1, group))
            smallest, largest = groups.amin(2), groups.amax(2)
        minimum = _half(smallest, -1)
        scale = _half((largest - minimum.float()) / (2**bits - 1), 1)
        made = cls(matrix.new_empty(0), scale, minimum, bits, along, group, channels)
        steps = made._spread(scale, 0, num_tokens)
        codes = (matrix - made._spread(minimum, 0, num_tokens)) / steps.masked_fill(steps == 0, 1.0)
        return replace(made, codes=pack(codes.round_().clamp_(0, 2**bits - 1).byte(), bits))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Matrices of the same form below each other; where two meet, a group of tokens ends."""
        first = parts[0]
        assert first.along == "channels" or not any(part.skipped for part in parts[1:])
        assert first.along == "channels" or all(part.ends_whole for part in parts[:-1])
        codes, scale, minimum = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "minimum")
        )
        return replace(first, codes=codes, scale=scale, minimum=minimum)

    @property
    def ends_whole(self) -> bool:
        """Whether the last group is complete, so that more tokens can follow it."""
        return self.along == "channels" or (len(self) + self.skipped) % self.group == 0

    def __len__(self) -> int:
        return self.codes.shape[0]

    def rows(self, low: int, high: int) -> Tensor:
        """Tokens [low, high) as numbers, (high - low, C) fp32."""
        codes = unpack(self.codes[low:high], self.bits, self.channels).float()
        return torch.addcmul(
            self._spread(self.minimum, low, high), codes, self._spread(self.scale, low, high)
        )

    def factors(self, low: int, high: int) -> None:
        """Codes have no low-rank part."""

    def stored(self, num_heads: int) -> StoredNumbers | None:
        """These codes as a native kernel reads them, for channels of so many heads; None where none can."""
        width = self.channels // num_heads
        if not can_be_read(width, like=self.codes):
            return None
        return StoredNumbers.of_codes(
            self.codes,
            self.scale,
            self.minimum,
            bits=self.bits,
            along_tokens=self.along == "tokens",
            group=self.group,
            skipped=self.skipped,
            num_heads=num_heads,
            width=width,
        )

    def native(self, num_heads: int) -> CodedNumbers | None:
        """The same, as all there is of a strand's keys or values."""
        stored = self.stored(num_heads)
        return None if stored is None else CodedNumbers.of(stored)

    def cut(self, low: int, high: int) -> Self:
        """Tokens [low, high) in storage of their own."""
        rows = slice(low, high)
        groups, skipped = rows, 0
        if self.along == "tokens":
            groups = slice((low + self.skipped) // self.group, -(-(high + self.skipped) // self.group))
            skipped = (low + self.skipped) % self.group
        codes, scale, minimum = self.codes[rows], self.scale[groups], self.minimum[groups]
        return replace(
            self, codes=codes.clone(), scale=scale.clone(), minimum=minimum.clone(), skipped=skipped
        )

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept."""
        return [self.codes, self.scale, self.minimum]

    def _spread(self, of_groups: Tensor, low: int, high: int) -> Tensor:
        """A number of each group for every token and channel of tokens [low, high), fp32."""
        if self.along == "channels":
            return of_groups[low:high].float().repeat_interleave(self.group, dim=1)
        low, high = low + self.skipped, high + self.skipped
        first, last = low // self.group, -(-high // self.group)
        if last - first == 1:
            return of_groups[first:last].float().expand(high - low, -1)
        rows = torch.arange(low, high, device=of_groups.device) // self.group - first
        return of_groups[first:last].float()[rows]


def _half(numbers: Tensor, direction: int) -> Tensor:
    """fp16, rounded down for direction -1 and up for 1; the largest of fp16 stays."""
    rounded = numbers.half()
    beyond = rounded.float() * direction < numbers * direction
    if not bool(beyond.any()):
        return rounded
    # fp16 numbers of one sign are ordered as the integers of the same bits are.
    integers = rounded.view(torch.int16)
    away = torch.where(rounded.signbit(), -direction, direction).to(torch.int16)
    stepped = (integers + away).view(torch.float16).masked_fill(rounded == 0, direction * 2.0**-24)
    return torch.where(beyond, stepped, rounded).clamp_(-LARGEST, LARGEST)
