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
from plait.memory.coded import BLOCK, CodedStrand, Factors, check_storable, matrix_of
from plait.memory.codes import AffineCodes
from plait.memory.plan import Codec, Notes
from plait.memory.strand import FrozenStrand, Heads
from plait.ops.coded import CodedNumbers, StoredNumbers, can_be_read

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
        return Recovered(codes, low_rank, _Sparse.of(error, places, num_heads))


def _outliers(matrix: Tensor, axis: int, sparsity: float) -> Tensor:
    """Where the largest and the smallest numbers of each vector along an axis are, bool."""
    places = torch.zeros_like(matrix, dtype=torch.bool)
    count = int(matrix.shape[axis] * sparsity / 2)
    for largest in (True, False):
        places.scatter_(axis, matrix.topk(count, dim=axis, largest=largest).indices, True)
    return places


@dataclass(frozen=True, eq=False)
class _LowRank:
    """A matrix of rank r for each head, `tokens @ channels.T`.

    Args:
        tokens: (T, G * r), fp16 or codes of 8 bits.
        channels: (G, D, r) fp16.
    """

    tokens: Tensor | AffineCodes
    channels: Tensor

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

    def native(self) -> tuple[StoredNumbers, Tensor] | None:
        """Tokens and channels as a kernel reads them; None where none can."""
        num_heads, _, rank = self.channels.shape
        if not can_be_read(rank, like=self.channels):
            return None
        if isinstance(self.tokens, AffineCodes):
            stored = self.tokens.stored(num_heads)
        else:
            stored = StoredNumbers.of_numbers(self.tokens.unflatten(1, (num_heads, rank)).transpose(0, 1))
        return None if stored is None else (stored, self.channels)

    def tensors(self) -> list[Tensor]:
        of_tokens = self.tokens.tensors() if isinstance(self.tokens, AffineCodes) else [self.tokens]
        return [*of_tokens, self.channels]


@dataclass(frozen=True, eq=False)
class _Sparse:
    """What is added at single places of a matrix (T, G * D): block by block of tokens, in each head by head.

    Args:
        starts: (blocks * G + 1,) int32, where the places of each block and head begin.
        tokens: token of each place within its block, uint8.
        channels: channel of each place within its head, int16.
        numbers: fp16.
        num_heads: G.
    """

    starts: Tensor
    tokens: Tensor
    channels: Tensor
    numbers: Tensor
    num_heads: int

    @classmethod
    def of(cls, matrix: Tensor, places: Tensor, num_heads: int) -> Self | None:
        if not bool(places.any()):
            return None
        tokens, channels = places.nonzero(as_tuple=True)
        head_dim = matrix.shape[1] // num_heads
        return cls._sorted(
            len(matrix), num_heads, tokens, channels // head_dim, channels % head_dim, matrix[places].half()
        )

    @classmethod
    def _sorted(
        cls, length: int, num_heads: int, tokens: Tensor, heads: Tensor, channels: Tensor, numbers: Tensor
    ) -> Self:
        """Numbers for `length` tokens at places given in the order of tokens."""
        runs = tokens // BLOCK * num_heads + heads
        order = runs.argsort(stable=True)
        starts = torch.zeros(-(-length // BLOCK) * num_heads + 1, dtype=torch.int32, device=tokens.device)
        starts[1:] = runs.bincount(minlength=len(starts) - 1).cumsum(0)
        in_block = (tokens % BLOCK)[order].to(torch.uint8)
        return cls(starts, in_block, channels[order].to(torch.int16), numbers[order], num_heads)

    def _between(self, low: int, high: int) -> tuple[slice, Tensor, Tensor, Tensor]:
        """Places in the blocks that hold tokens [low, high): which, their tokens and heads, and which are inside."""
        first = low // BLOCK * self.num_heads
        starts = self.starts[first : -(-high // BLOCK) * self.num_heads + 1].long()
        runs = torch.arange(first, first + len(starts) - 1, device=starts.device)
        runs = runs.repeat_interleave(starts.diff())
        which = slice(int(starts[0]), int(starts[-1]))
        tokens = runs // self.num_heads * BLOCK + self.tokens[which].long()
        return which, tokens, runs % self.num_heads, (tokens >= low) & (tokens < high)

    def add_to(self, block: Tensor, low: int) -> None:
        """Add what belongs to the tokens from `low` on to their numbers (t, G * D)."""
        which, tokens, heads, inside = self._between(low, low + len(block))
        columns = heads * (block.shape[1] // self.num_heads) + self.channels[which].long()
        block[(tokens - low)[inside], columns[inside]] += self.numbers[which][inside].float()

    def cut(self, low: int, high: int) -> Self:
        which, tokens, heads, inside = self._between(low, high)
        order = tokens[inside].argsort(stable=True)
        kept = ((tokens - low), heads, self.channels[which], self.numbers[which])
        return self._sorted(high - low, self.num_heads, *(part[inside][order] for part in kept))

    def native(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.starts, self.tokens, self.channels, self.numbers

    def tensors(self) -> list[Tensor]:
        return [self.starts, self.tokens, self.channels, self.numbers]


@dataclass(frozen=True, eq=False)
class Recovered:
    """Codes (T, C), the low-rank part of their error, and what single places still lack."""

    codes: AffineCodes
    low_rank: _LowRank | None
    sparse: _Sparse | None

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

    def native(self, num_heads: int) -> CodedNumbers | None:
        stored = self.codes.stored(num_heads)
        factor = None if self.low_rank is None else self.low_rank.native()
        if stored is None or (self.low_rank is not None and factor is None):
            return None
        return CodedNumbers.of(
            stored, factor=factor, outliers=None if self.sparse is None else self.sparse.native()
        )

    def tensors(self) -> list[Tensor]:
        parts = (self.codes, self.low_rank, self.sparse)
        return [tensor for part in parts if part is not None for tensor in part.tensors()]
