"""Matrices of low-bit codes with a scale for each group of columns: what all scalar formats store.

A weight is `scale * (code - zero)`, or `scale * table[code]` where the grid is a table; in tables with
special values, the last code stands for one of four values, which each group chooses. Scales are fp16,
or 8-bit steps of one fp32 number for each row. In the grid `planes` each bit of a code is a matrix of its own: a weight
is `scale * (high bit) + low_scale * (low bit)`.

Shapes: O output rows, I input columns, T tiles of 16 rows, B blocks of 32 columns, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from plait import ops
from plait.errors import ConfigError
from plait.weights.format import Packed, take_tensors
from plait.weights.tiles import BLOCK, TILE, from_tiles, num_blocks, num_tiles, to_tiles

__all__ = ["GRIDS", "Coded", "Grid", "from_groups", "group_sizes", "grouped", "half", "num_groups", "stepped"]

_MAX_COLUMNS, _MAX_ROWS = 1 << 20, 1 << 28


class Grid(NamedTuple):
    """The values that a code may stand for, before the scale.

    Attributes:
        name: as files have it.
        bits: of a code.
        values: one for each code; empty where a code stands for `code - zero`.
        specials: the four values that the last code may stand for; empty for none.
        has_planes: whether each of the two bits has a scale of its own.
    """

    name: str
    bits: int
    values: tuple[int, ...] = ()
    specials: tuple[int, ...] = ()
    has_planes: bool = False

    @property
    def num_codes(self) -> int:
        """How many codes are used: all, but for the last of a table in which it stands for what another one does."""
        return (1 << self.bits) if self.specials or not self.values else len(set(self.values))


_FP3, _FP4 = (-4, -2, -1, 0, 1, 2, 4), (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
# Of normal-float 4 in steps of 1/2112 of the largest, the finest that the native form multiplies in whole numbers.
_NF4 = (-2112, -1470, -1109, -834, -601, -390, -192, 0, 168, 340, 520, 714, 931, 1188, 1527, 2112)
GRIDS = {
    grid.name: grid
    for grid in (
        *(Grid(f"uniform{bits}", bits) for bits in (2, 3, 4, 8)),
        Grid("planes", 2, has_planes=True),
        # The last code of a table without special values is never used.
        Grid("fp3", 3, (*_FP3, 0)),
        Grid("fp4", 4, (*_FP4, 0)),
        Grid("nf4", 4, _NF4),
        Grid("bitmod3", 3, (*_FP3, 0), (3, -3, 6, -6)),
        Grid("bitmod4", 4, (*_FP4, 0), (10, -10, 16, -16)),
    )
}


class Coded(Packed, kind="coded"):
    """A matrix of codes. In native form it is multiplied as it lies here, without another copy.

    With 15-bit activations (see `ops.PackedMatrix`) unless `is_exact`, which multiplies in fp32.

    Args:
        shape: (O, I).
        grid: what codes stand for.
        group: columns that share a scale, the last group may be shorter; 0 for the whole row.
        codes: uint8, (T, B, 64 * bits); see `plait.weights.tiles`.
        scales: (T, G, 16), fp16, or uint8 where there are `row_scales`.
        zeros: fp16 (T, G, 16), or None: half of the codes' range.
        types: uint8 (T, G, 4), two bits for each row from the lowest up: which special value it has.
        row_scales: fp32 (T, 16), the size of one step of an 8-bit scale.
        low_scales: fp16 (T, G, 16), of the low bits, where the grid has planes.

    Raises:
        ConfigError: tensors that do not fit together.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    types: Tensor | None
    row_scales: Tensor | None
    low_scales: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        grid: Grid,
        group: int,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        types: Tensor | None = None,
        row_scales: Tensor | None = None,
        low_scales: Tensor | None = None,
    ) -> None:
        super().__init__(shape, grid.name)
        self.grid, self.group, self.is_exact = grid, group, False
        given = {
            "codes": codes, "scales": scales, "zeros": zeros, "types": types, "row_scales": row_scales,
            "low_scales": low_scales,
        }  # fmt: skip
        take_tensors(
            {name: t for name, t in given.items() if t is not None}, _parts(self.shape, grid, group, given)
        )
        for name, tensor in given.items():
            self.register_buffer(name, tensor)

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        """The chosen rows in fp32: (rows, I), or (*rows.shape, I) for a tensor of row numbers."""
        numbers = torch.arange(self.shape[0])[rows]
        flat = numbers.reshape(-1)
        codes = from_tiles(self.codes, self.grid.bits, flat, self.shape[1])
        return self._values(codes, flat).view(*numbers.shape, self.shape[1])

    def code_rows(self) -> Tensor:
        """The codes, uint8 (O, I)."""
        return from_tiles(self.codes, self.grid.bits, torch.arange(self.shape[0]), self.shape[1])

    def per_group(self, tensor: Tensor) -> Tensor:
        """A number of each group and row as it lies in tiles, (T, G, 16), by rows: (O, G)."""
        return tensor.permute(0, 2, 1).reshape(-1, tensor.shape[1])[: self.shape[0]]

    @property
    def has_native_form(self) -> bool:
        return self.native is not None or (
            self.codes.device.type == "cpu"
            and self.shape[1] % BLOCK == 0
            and (self.group % BLOCK == 0 or self.group >= self.shape[1])
            and ops.has_native_matrices()
        )

    def to_native(self) -> ops.PackedMatrix:
        if self.native is None:
            self.native = ops.GridMatrix(
                self.shape, self.grid.bits, self.group, self.codes, self.scales, self.zeros, self.types,
                self.row_scales, self.grid.values, self.grid.specials, self.low_scales,
            )  # fmt: skip
        return self.native

    def matmul(self, x: Tensor) -> Tensor:
        if self.has_native_form and not (torch.is_grad_enabled() and x.requires_grad):
            native = self.to_native()
            assert isinstance(native, ops.GridMatrix)
            return native.matmul_exact(x) if self.is_exact else native.matmul(x)
        return super().matmul(x)

    def select(self, rows: Tensor) -> Coded:
        """A new matrix whose row i is row `rows[i]` of this one; nothing is decoded."""
        by_row = {
            name: self.per_group(tensor)[rows]
            for name, tensor in (
                ("scales", self.scales),
                ("zeros", self.zeros),
                ("low_scales", self.low_scales),
            )
            if tensor is not None
        }
        return from_groups(
            self.grid,
            self.group,
            self.code_rows()[rows],
            by_row["scales"],
            zeros=by_row.get("zeros"),
            types=None if self.types is None else self.type_rows()[rows],
            row_scales=None if self.row_scales is None else self.row_scales.reshape(-1)[rows],
            low_scales=by_row.get("low_scales"),
        )

    def tunable(self) -> Packed:
        from plait.weights.tunable import TunableCodes

        return TunableCodes(self)

    def nbytes(self) -> int:
        # The native form borrows these tensors.
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())

    def settings(self) -> dict[str, Any]:
        return {"grid": self.grid.name, "group": self.group}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Self:
        name, group = settings.get("grid"), settings.get("group")
        grid = GRIDS.get(name) if isinstance(name, str) else None
        if grid is None or type(group) is not int or not 0 <= group <= _MAX_COLUMNS:
            raise ConfigError(f"its grid is {name!r:.40} with groups of {group!r:.40}, which is not known")
        known = {"codes", "scales", "zeros", "types", "row_scales", "low_scales"}
        if not {"codes", "scales"} <= tensors.keys() <= known:
            raise ConfigError(f"it has the parts {sorted(tensors)}, not codes and scales")
        return cls(shape, grid, group, **tensors)

    def type_rows(self) -> Tensor:
        """Which special value each row has in each group, (O, G)."""
        assert self.types is not None
        spread = (self.types[..., None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3  # (T, G, 4, 4)
        return self.per_group(spread.flatten(2))

    def _values(self, codes: Tensor, rows: Tensor) -> Tensor:
        """What codes (R, I) of these rows stand for, fp32."""
        group_of = torch.arange(self.shape[1]) // (self.group or max(1, self.shape[1]))
        tile, lane = rows // TILE, rows % TILE
        scales = self.scales[tile, :, lane].float()[:, group_of]
        if self.low_scales is not None:
            low = self.low_scales[tile, :, lane].float()[:, group_of]
            return torch.where(codes > 1, scales, 0.0) + torch.where(codes & 1 > 0, low, 0.0)
        if not self.grid.values:
            half_range = float(1 << (self.grid.bits - 1))
            zeros = half_range if self.zeros is None else self.zeros[tile, :, lane].float()[:, group_of]
            values = scales * (codes.float() - zeros)
        else:
            values = torch.tensor(self.grid.values, dtype=torch.float32)[codes.long()]
            if self.types is not None:
                shifts = (2 * (lane % 4)).to(torch.uint8)[:, None]
                types = ((self.types[tile, :, lane // 4] >> shifts) & 3)[:, group_of]
                special = torch.tensor(self.grid.specials, dtype=torch.float32)[types.long()]
                values = torch.where(codes == len(self.grid.values) - 1, special, values)
            values = values * scales
        return values if self.row_scales is None else values * self.row_scales.reshape(-1)[rows][:, None]


def num_groups(columns: int, group: int) -> int:
    """Groups of a row; the last may be shorter than `group`, and 0 means the whole row."""
    return -(-columns // (group or max(1, columns)))


def group_sizes(columns: int, group: int) -> list[int]:
    """Columns of each group."""
    size = group or max(1, columns)
    return [min(size, columns - start) for start in range(0, columns, size)]


def grouped(weight: Tensor, group: int) -> list[Tensor]:
    """A matrix (O, I) as one or two tensors (O, groups, columns of a group): whole groups, then a short one."""
    size = group or max(1, weight.shape[1])
    whole = weight.shape[1] // size * size
    parts = [weight[:, :whole].reshape(weight.shape[0], -1, size)] if whole else []
    return [*parts, weight[:, None, whole:]] if whole < weight.shape[1] else parts


def half(numbers: Tensor, what: str) -> Tensor:
    """Numbers rounded to fp16.

    Raises:
        ConfigError: one of them is NaN, infinite, or above 65504.
    """
    rounded = numbers.to(torch.float16)
    if not torch.isfinite(rounded).all():
        raise ConfigError(
            f"{what} are kept in fp16, up to 65504. The weight has NaN, infinite or larger values."
        )
    return rounded


def stepped(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (O, G) in steps of 1/255 of the largest of each row: whole numbers up to 255 in fp32, and steps fp32 (O,)."""
    steps = scales.amax(dim=1) / 255
    # Tiny weights would give a subnormal step, whose multiples are not exact.
    steps = torch.where(steps < 2.0**-120, 0.0, steps)
    return torch.where(steps[:, None] > 0, (scales / steps[:, None].clamp(min=2.0**-120)).round(), 0.0), steps


def from_groups(
    grid: Grid,
    group: int,
    codes: Tensor,
    scales: Tensor,
    *,
    zeros: Tensor | None = None,
    types: Tensor | None = None,
    row_scales: Tensor | None = None,
    low_scales: Tensor | None = None,
) -> Coded:
    """Put codes and numbers by rows into tiles.

    Args:
        codes: uint8 (O, I).
        scales: (O, G) in the type to be kept.
        zeros, low_scales: (O, G) fp16; types: uint8 (O, G), each below 4; row_scales: fp32 (O,).
    """
    packed_types = None
    if types is not None:
        by_four = _tiled(types).view(num_tiles(len(types)), -1, 4, 4)
        packed_types = by_four[..., 0].clone()
        for index in range(1, 4):
            packed_types |= by_four[..., index] << (2 * index)
    return Coded(
        (codes.shape[0], codes.shape[1]),
        grid,
        group,
        to_tiles(codes, grid.bits),
        _tiled(scales),
        None if zeros is None else _tiled(zeros),
        packed_types,
        None if row_scales is None else _tiled(row_scales[:, None])[:, 0].clone(),
        None if low_scales is None else _tiled(low_scales),
    )


def _tiled(numbers: Tensor) -> Tensor:
    """(O, G) -> (T, G, 16); rows that fill up the last tile hold 0."""
    tiles = num_tiles(numbers.shape[0])
    padded = numbers.new_zeros(tiles * TILE, numbers.shape[1])
    padded[: numbers.shape[0]] = numbers
    return padded.view(tiles, TILE, -1).permute(0, 2, 1).contiguous()


def _parts(
    shape: tuple[int, int], grid: Grid, group: int, given: Mapping[str, Tensor | None]
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """The parts that a matrix of this shape must have, where optional ones are given."""
    rows, columns = shape
    if not (0 <= rows <= _MAX_ROWS and 0 <= columns <= _MAX_COLUMNS):
        raise ConfigError(f"its shape is {shape}, which is not that of a matrix")
    tiles, groups = num_tiles(rows), num_groups(columns, group)
    parts: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "codes": ((tiles, num_blocks(columns), 64 * grid.bits), (torch.uint8,)),
    }
    is_stepped = given["row_scales"] is not None and not grid.has_planes
    parts["scales"] = ((tiles, groups, TILE), (torch.uint8 if is_stepped else torch.float16,))
    if is_stepped:
        parts["row_scales"] = ((tiles, TILE), (torch.float32,))
    if grid.specials:
        parts["types"] = ((tiles, groups, 4), (torch.uint8,))
    if grid.has_planes:
        parts["low_scales"] = ((tiles, groups, TILE), (torch.float16,))
    elif given["zeros"] is not None and not grid.values:
        parts["zeros"] = ((tiles, groups, TILE), (torch.float16,))
    return parts
