"""GEAR: keys and values as low-bit codes, repaired by a low-rank part and a few exact outliers.

Paper: Kang et al. 2024, arXiv:2403.05527, Algorithm 1 and section 3; the backbone with groups is that of
KIVI (Liu et al. 2024, arXiv:2402.02750).
Shapes: T tokens of a chunk, G key/value heads, D head size, C = G * D channels, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.memory.codecs.dense import DTYPES
from plait.memory.coded import CodedStrand, Factors, check_storable, matrix_of
from plait.memory.codes import AffineCodes
from plait.memory.plan import Codec, Notes
from plait.memory.strand import FrozenStrand, Heads

__all__ = ["GEAR"]

_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class GEAR(Codec, name="gear"):
    """Store keys and values in a little more than `bits` bits a number.

    Lossy: each number is coded in steps of its group, the largest and smallest are kept exactly (to fp16),
    and the error of the others is approximated by a matrix of low rank. A prompt is read with exact
    attention and coded at its end as one chunk; new tokens wait in a buffer of plain numbers and are coded
    `buffer` at a time. `rank=0,rank_decode=0,sparsity=0` is the backbone alone, `sparsity=0` the paper's
    GEAR-L. Nothing is coded twice.

    Reading costs one pass that turns codes into numbers, a block of 256 tokens at a time; the low-rank part
    adds r channels to it.

    Args:
        bits: bits of each code: 2, 3, 4 or 8.
        backbone: `kcvt` has one step for each key channel of a chunk and for each token's values; `kivi` one
            for each `group` tokens of a key channel and each `group` channels of a token's values. Use
            `kivi` for 2 bits.
        group: numbers in a group of `kivi`; divides the value channels of all heads.
        rank: of the low-rank part of a prompt, for each head.
        rank_decode: of the low-rank part of a chunk of new tokens.
        sparsity: fraction of numbers kept exactly, half of them the largest and half the smallest of each
            key channel and of each token's values.
        buffer: new tokens that are coded at once; for `kivi` a multiple of `group`.
        factor_bits: bits of the token-sided factor of the low-rank part, 8 or 16.
        sinks: first tokens of the sequence that stay plain numbers.
        dtype: number format of the buffer and of those first tokens.
    """

    bits: Literal[2, 3, 4, 8] = 4
    backbone: Literal["kcvt", "kivi"] = "kivi"
    group: Annotated[int, Field(ge=1)] = 64
    rank: Annotated[int, Field(ge=0)] = 4
    rank_decode: Annotated[int, Field(ge=0)] = 2
    sparsity: Annotated[float, Field(ge=0, lt=0.5)] = 0.02
    buffer: Annotated[int, Field(ge=1)] = 64
    factor_bits: Literal[8, 16] = 16
    sinks: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"

    def check(self) -> None:
        if self.backbone == "kivi" and self.buffer % self.group:
            raise ConfigError(
                f"GEAR.buffer must be a multiple of GEAR.group for backbone=kivi. "
                f"Got {self.buffer} and {self.group}."
            )

    def check_heads(self, heads: Heads) -> None:
        head_dims = (heads.head_dim, heads.value_dim or heads.head_dim)
        channels = heads.num_kv_heads * head_dims[1]
        if self.backbone == "kivi" and channels % self.group:
            raise ConfigError(
                f"GEAR.group must divide the {channels} value channels of all heads. Got {self.group}."
            )
        if max(self.rank, self.rank_decode) > min(head_dims):
            raise ConfigError(
                f"GEAR.rank and GEAR.rank_decode must be at most the head size {min(head_dims)}. "
                f"Got {self.rank} and {self.rank_decode}."
            )

    @property
    def tail_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def exact_first(self) -> int:
        return self.sinks

    def whole(self, count: int) -> int:
        return count - count % self.group if self.backbone == "kivi" else count

    def ready(self, count: int) -> int:
        return self.whole(count) if count >= self.buffer else 0

    def encode(self, strand: FrozenStrand, notes: Notes | None) -> CodedStrand:
        check_storable(self, strand)
        return CodedStrand(
            strand.heads,
            self._coded(strand.keys, "tokens"),
            self._coded(strand.values, "channels"),
            offset=strand.offset,
            start=strand.start,
        )

    def _coded(self, numbers: Tensor, along: Literal["tokens", "channels"]) -> Recovered:
        """Keys (G, T, D) with groups along tokens, or values with groups along channels."""
        num_heads, num_tokens, head_dim = numbers.shape
        exact = matrix_of(numbers)
        group = self.group if self.backbone == "kivi" else exact.shape[0 if along == "tokens" else 1]
        axis = 0 if along == "tokens" else 1
        places = _outliers(exact, axis, self.sparsity)
        smooth = torch.where(places, exact.mean(dim=axis, keepdim=True), exact)
        codes = AffineCodes.of(smooth, self.bits, along, group)
        error = (exact - codes.rows(0, num_tokens)).masked_fill_(places, 0.0)
        rank = min(self.rank if num_tokens > self.buffer else self.rank_decode, num_tokens, head_dim)
        low_rank = _LowRank.of(
            error.unflatten(1, (num_heads, head_dim)).transpose(0, 1), rank, self.factor_bits
        )
        # Outliers come last, so that they make good for the low-rank part at their places too.
        error = exact - codes.rows(0, num_tokens)
        if low_rank is not None:
            error -= low_rank.matrix()
        return Recovered(codes, low_rank, _Sparse.of(error, places))


def _outliers(matrix: Tensor, axis: int, sparsity: float) -> Tensor:
    """Where the largest and the smallest numbers of each vector along an axis are, bool."""
    places = torch.zeros_like(matrix, dtype=torch.bool)
    count = int(matrix.shape[axis] * sparsity / 2)
    for largest in (True, False):
        places.scatter_(axis, matrix.topk(count, dim=axis, largest=largest).indices, True)
    return places


class _LowRank:
    """A matrix of rank r for each head, `tokens @ channels.T`.

    Args:
        tokens: (T, G * r), fp16 or codes of 8 bits.
        channels: (G, D, r) fp16.
    """

    def __init__(self, tokens: Tensor | AffineCodes, channels: Tensor) -> None:
        self.tokens, self.channels = tokens, channels

    @classmethod
    def of(cls, error: Tensor, rank: int, bits: int) -> Self | None:
        """The best approximation (nearly) of an error (G, T, D), by power iteration from a fixed start."""
        if rank == 0:
            return None
        seeded = torch.Generator().manual_seed(0)
        right = (
            torch.randn(error.shape[2], rank, generator=seeded).to(error.device).expand(len(error), -1, -1)
        )
        for step in range(_PASSES):
            is_last = step == _PASSES - 1
            if is_last:
                right = torch.linalg.qr(right).Q
            left = error @ right
            if is_last:
                left = torch.linalg.qr(left).Q
            right = error.transpose(1, 2) @ left
        tokens = matrix_of(left)
        if bits == 8:
            return cls(AffineCodes.of(tokens, 8, "tokens", len(tokens)), right.half())
        return cls(tokens.half(), right.half())

    def factors(self, low: int, high: int) -> Factors:
        tokens = self.tokens
        rows = tokens.rows(low, high) if isinstance(tokens, AffineCodes) else tokens[low:high].float()
        rows = rows.unflatten(1, (len(self.channels), -1)).transpose(0, 1)
        return Factors(rows, self.channels.float())

    def matrix(self) -> Tensor:
        """(T, G * D), for what is still wrong with it."""
        tokens, channels = self.factors(0, len(self.tokens))
        return matrix_of(tokens @ channels.transpose(1, 2))

    def cut(self, low: int, high: int) -> Self:
        if isinstance(self.tokens, AffineCodes):
            return type(self)(self.tokens.cut(low, high), self.channels.clone())
        return type(self)(self.tokens[low:high].clone(), self.channels.clone())

    def tensors(self) -> list[Tensor]:
        of_tokens = self.tokens.tensors() if isinstance(self.tokens, AffineCodes) else [self.tokens]
        return [*of_tokens, self.channels]


class _Sparse:
    """What is added at single places of a matrix (T, C), token by token.

    Args:
        starts: (T + 1,) int32, where each token's places begin.
        channels: 16-bit channel of each place.
        numbers: fp16.
    """

    def __init__(self, starts: Tensor, channels: Tensor, numbers: Tensor) -> None:
        self.starts, self.channels, self.numbers = starts, channels, numbers

    @classmethod
    def of(cls, matrix: Tensor, places: Tensor) -> Self | None:
        if not bool(places.any()):
            return None
        starts = torch.zeros(len(matrix) + 1, dtype=torch.int32, device=matrix.device)
        starts[1:] = places.sum(1).cumsum(0)
        # Channels up to 65,535 fit as signed numbers around 0.
        channels = (places.nonzero()[:, 1] - 2**15).to(torch.int16)
        return cls(starts, channels, matrix[places].half())

    def add_to(self, block: Tensor, low: int) -> None:
        """Add what belongs to the tokens from `low` on to their numbers (t, C)."""
        starts = self.starts[low : low + len(block) + 1].long()
        first, stop = int(starts[0]), int(starts[-1])
        tokens = torch.arange(len(block), device=block.device).repeat_interleave(starts.diff())
        channels = self.channels[first:stop].long() + 2**15
        block[tokens, channels] += self.numbers[first:stop].float()

    def cut(self, low: int, high: int) -> Self:
        starts = self.starts[low : high + 1]
        places = slice(int(starts[0]), int(starts[-1]))
        return type(self)(starts - starts[0], self.channels[places].clone(), self.numbers[places].clone())

    def tensors(self) -> list[Tensor]:
        return [self.starts, self.channels, self.numbers]


class Recovered:
    """Codes (T, C), the low-rank part of their error, and what single places still lack."""

    def __init__(self, codes: AffineCodes, low_rank: _LowRank | None, sparse: _Sparse | None) -> None:
        self.codes, self.low_rank, self.sparse = codes, low_rank, sparse

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, low: int, high: int) -> Tensor:
        block = self.codes.rows(low, high)
        if self.sparse is not None:
            self.sparse.add_to(block, low)
        return block

    def factors(self, low: int, high: int) -> Factors | None:
        return None if self.low_rank is None else self.low_rank.factors(low, high)

    def cut(self, low: int, high: int) -> Recovered:
        return Recovered(
            self.codes.cut(low, high),
            None if self.low_rank is None else self.low_rank.cut(low, high),
            None if self.sparse is None else self.sparse.cut(low, high),
        )

    def tensors(self) -> list[Tensor]:
        parts = (self.codes, self.low_rank, self.sparse)
        return [tensor for part in parts if part is not None for tensor in part.tensors()]
