"""Matrices as sums of blocks of about one bit a weight, of which any number of the first may be held.

Block i adds `S_i * (U_i V_i^T)`, element by element: signs times the product of two thin factors. A block is one
run of bytes, so that it is read from a file, and let go of, as a whole:

* signs, uint16 [tile of 16 rows][column]: bit r is set where row r of the tile is negative;
* U, fp16 [tile][rank][16 rows];
* V, fp16 [column][rank].

Rows that fill up the last tile hold 0.

Shapes: O output rows, I input columns, T tiles of 16 rows, K rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from plait import ops
from plait.errors import ConfigError
from plait.weights.format import Packed
from plait.weights.tiles import BLOCK, TILE, num_tiles

__all__ = ["MAX_BLOCKS", "MAX_RANK", "BlockStack", "SignedBlock", "block_bytes", "join_block", "split_block"]

MAX_BLOCKS, MAX_RANK = 64, 16
_MAX_COLUMNS, _MAX_ROWS = 1 << 20, 1 << 28


class SignedBlock(NamedTuple):
    """One block in parts: what it adds to the matrix is `where(is_negative, -1, 1) * (u @ v.T)`."""

    is_negative: Tensor  # bool (O, I)
    u: Tensor  # fp16 (O, K)
    v: Tensor  # fp16 (I, K)

    def values(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """What the block adds to some rows, fp32 (R, I)."""
        u, v = self.u[rows].float(), self.v.float()
        # Term after term: a row has the same bits whichever rows it is made with.
        size = u[:, :1] * v[:, 0]
        for index in range(1, v.shape[1]):
            size += u[:, index, None] * v[:, index]
        return torch.where(self.is_negative[rows], -size, size)


def block_bytes(shape: tuple[int, int], rank: int) -> int:
    """Bytes of one block of a matrix of this shape."""
    return num_tiles(shape[0]) * (2 * shape[1] + 2 * TILE * rank) + 2 * shape[1] * rank


def join_block(block: SignedBlock) -> Tensor:
    """The bytes of a block, uint8 (block_bytes,)."""
    rows, columns = block.is_negative.shape
    rank, tiles = block.u.shape[1], num_tiles(rows)
    padded = torch.zeros(tiles * TILE, columns, dtype=torch.int32)
    padded[:rows] = block.is_negative
    words = (padded.view(tiles, TILE, columns) << torch.arange(TILE, dtype=torch.int32)[:, None]).sum(dim=1)
    signs = torch.stack([words & 255, words >> 8], dim=2).to(torch.uint8)
    u = torch.zeros(tiles * TILE, rank, dtype=torch.float16)
    u[:rows] = block.u
    tiled = u.view(tiles, TILE, rank).transpose(1, 2).contiguous()
    parts = [signs.reshape(-1), *(t.contiguous().view(torch.uint8).reshape(-1) for t in (tiled, block.v))]
    return torch.cat(parts)


def split_block(raw: Tensor, shape: tuple[int, int], rank: int) -> SignedBlock:
    """The parts of a block from its bytes."""
    rows, columns = shape
    tiles = num_tiles(rows)
    ends = [2 * tiles * columns, 2 * tiles * TILE * rank, 2 * columns * rank]
    signs, u, v = raw.split(ends)
    by_byte = signs.view(tiles, columns, 2)[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    is_negative = by_byte.flatten(2).transpose(1, 2).reshape(tiles * TILE, columns)[:rows].bool()
    # A copy, as bytes may lie at an odd address.
    halves_u, halves_v = u.clone().view(torch.float16), v.clone().view(torch.float16)
    by_row = halves_u.view(tiles, rank, TILE).transpose(1, 2).reshape(tiles * TILE, rank)[:rows]
    return SignedBlock(is_negative, by_row, halves_v.view(columns, rank))


class BlockStack(Packed, kind="blocks"):
    """The first blocks of a matrix, at least one; the others may be somewhere else and come later.

    In native form it is multiplied as it lies here: tiles of 16 rows are made anew for every pass, in fp32, in the
    cache. Products with activations in 15 bits (see `ops.PackedMatrix`) belong to a lowered model; `matmul` itself
    multiplies in fp32. A row's result has the same bits in any batch.

    Args:
        shape: (O, I).
        rank: columns K of the factors.
        blocks: bytes of each, uint8 (block_bytes,), the first ones.
        depth: how many blocks the matrix has where it is whole.

    Raises:
        ConfigError: numbers or lengths that do not fit together.
    """

    def __init__(self, shape: tuple[int, int], rank: int, blocks: Sequence[Tensor], depth: int) -> None:
        super().__init__(shape, "bitstack")
        self.rank, self.depth = rank, depth
        if not (0 <= shape[0] <= _MAX_ROWS and 0 <= shape[1] <= _MAX_COLUMNS):
            raise ConfigError(f"its shape is {shape}, which is not that of a matrix")
        if not 1 <= rank <= MAX_RANK or not 1 <= depth <= MAX_BLOCKS:
            raise ConfigError(
                f"it has rank {rank} and {depth} blocks, but at most {MAX_RANK} and {MAX_BLOCKS} are read"
            )
        self.blocks: tuple[Tensor, ...] = ()
        self.hold(blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes of each block."""
        return block_bytes(self.shape, self.rank)

    def hold(self, blocks: Sequence[Tensor]) -> None:
        """Be made of these blocks, the first of the matrix, from now on; the tensors are kept without a copy.

        Raises:
            ConfigError: none, more than there are, or one of another length; nothing was changed.
        """
        if not 1 <= len(blocks) <= self.depth:
            raise ConfigError(f"it has {len(blocks)} blocks of at least 1 and at most {self.depth}")
        for index, block in enumerate(blocks):
            if block.dtype != torch.uint8 or tuple(block.shape) != (self.block_bytes,):
                raise ConfigError(
                    f"its block {index} is {block.dtype} of shape {tuple(block.shape)} and must be"
                    f" torch.uint8 of shape {(self.block_bytes,)}"
                )
        self.blocks = tuple(block.contiguous() for block in blocks)
        if self.native is not None:
            assert isinstance(self.native, ops.StackMatrix)
            self.native.hold(self.blocks)

    def parts(self) -> list[SignedBlock]:
        """The blocks that are held, in parts."""
        return [split_block(block, self.shape, self.rank) for block in self.blocks]

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        numbers = torch.arange(self.shape[0])[rows]
        flat = numbers.reshape(-1)
        first, *others = self.parts()
        total = first.values(flat)
        for part in others:
            total += part.values(flat)
        return total.view(*numbers.shape, self.shape[1])

    @property
    def has_native_form(self) -> bool:
        return self.native is not None or (
            all(block.device.type == "cpu" for block in self.blocks)
            and self.shape[1] > 0
            and self.shape[1] % BLOCK == 0
            and ops.has_native_matrices()
        )

    def to_native(self) -> ops.PackedMatrix:
        if self.native is None:
            self.native = ops.StackMatrix(self.shape, self.rank, self.blocks)
        return self.native

    def matmul(self, x: Tensor) -> Tensor:
        if self.has_native_form and not (torch.is_grad_enabled() and x.requires_grad):
            native = self.to_native()
            assert isinstance(native, ops.StackMatrix)
            return native.matmul_exact(x)
        return super().matmul(x)

    def select(self, rows: Tensor) -> BlockStack:
        chosen = [
            join_block(SignedBlock(part.is_negative[rows], part.u[rows], part.v)) for part in self.parts()
        ]
        return BlockStack((len(rows), self.shape[1]), self.rank, chosen, self.depth)

    def nbytes(self) -> int:
        # The native form borrows the blocks.
        return sum(block.numel() for block in self.blocks)

    def tensors(self) -> dict[str, Tensor]:
        return {f"block{index}": block for index, block in enumerate(self.blocks)}

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "depth": self.depth}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Self:
        """The matrix of the blocks that are given; they may be the first of those that it has."""
        rank, depth = settings.get("rank"), settings.get("depth")
        if type(rank) is not int or type(depth) is not int:
            raise ConfigError(
                f"its rank is {rank!r:.40} and its depth {depth!r:.40}, which are no whole numbers"
            )
        names = [f"block{index}" for index in range(min(len(tensors), MAX_BLOCKS))]
        if set(names) != set(tensors):
            raise ConfigError(f"it has the parts {sorted(tensors)}, not blocks from block0 on")
        return cls(shape, rank, [tensors[name] for name in names], depth)
