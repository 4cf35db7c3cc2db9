"""Codes of 2, 3, 4 or 8 bits in the order in which the native kernels read them.

A tile is 16 output rows; a tile is cut into blocks of 32 columns, and a block into 8 groups of 4
columns. One *plane* is 64 bytes, [row of the tile][column of the group], and holds

* 8 bits: one group, a byte for each code; 8 planes;
* 4 bits: groups 2j and 2j + 1 in the low and high half of each byte; 4 planes;
* 2 bits: groups 4j, ..., 4j + 3 from the lowest bits up; 2 planes;
* 3 bits: the lowest two bits as above, then a plane whose bit g is the third bit of group g.

So a block takes 64 * bits bytes. Rows and columns that fill up tiles and blocks hold code 0.

Shapes: O output rows, I input columns, T tiles, B blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "TILE", "from_tiles", "num_blocks", "num_tiles", "to_tiles"]

TILE, BLOCK = 16, 32


def num_tiles(rows: int) -> int:
    """Tiles of a matrix with this many rows."""
    return -(-rows // TILE)


def num_blocks(columns: int) -> int:
    """Blocks of each tile of a matrix with this many columns."""
    return -(-columns // BLOCK)


def to_tiles(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 (O, I), each below 2^bits, into uint8 (T, B, 64 * bits)."""
    rows, columns = codes.shape
    tiles, blocks = num_tiles(rows), num_blocks(columns)
    padded = codes.new_zeros(tiles * TILE, blocks * BLOCK)
    padded[:rows, :columns] = codes
    # (T, 16, B, 8, 4) -> (T, B, 8, 64)
    groups = padded.view(tiles, TILE, blocks, 8, 4).permute(0, 2, 3, 1, 4).reshape(tiles, blocks, 8, 64)
    if bits == 8:
        planes = groups
    elif bits == 4:
        planes = _joined(groups, 4)
    else:
        planes = _joined(groups & 3, 2)
        if bits == 3:
            planes = torch.cat([planes, _joined(groups >> 2, 1)], dim=2)
    return planes.reshape(tiles, blocks, 64 * bits)


def from_tiles(tiles: Tensor, bits: int, rows: Tensor, columns: int) -> Tensor:
    """The codes of some rows: uint8 (T, B, 64 * bits) and int64 row numbers (R,) -> uint8 (R, I)."""
    planes = tiles.view(*tiles.shape[:2], bits, TILE, 4)[rows // TILE, :, :, rows % TILE]  # (R, B, planes, 4)
    if bits == 8:
        groups = planes
    elif bits == 4:
        groups = _split(planes, 4)
    else:
        groups = _split(planes[:, :, :2], 2)
        if bits == 3:
            groups = groups | (_split(planes[:, :, 2:], 1) << 2)
    return groups.reshape(len(rows), tiles.shape[1] * BLOCK)[:, :columns]


def _joined(groups: Tensor, bits: int) -> Tensor:
    """Planes of 8 / bits groups each: (T, B, 8, 64) -> (T, B, bits, 64)."""
    each = 8 // bits
    parts = groups.view(*groups.shape[:2], bits, each, 64)
    out = parts[:, :, :, 0].clone()
    for index in range(1, each):
        out |= parts[:, :, :, index] << (bits * index)
    return out


def _split(planes: Tensor, bits: int) -> Tensor:
    """(R, B, planes, 4) -> (R, B, planes * 8 / bits, 4)."""
    mask = (1 << bits) - 1
    parts = [(planes >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=3).flatten(2, 3)
