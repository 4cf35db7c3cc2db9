"""Packed matrices in the form in which they are tuned: numbers that are trained, and codes that may be chosen anew.

A matrix is cut into code groups of W columns of a row, each of which has M codes: W = M = 1 where every weight has
a code of its own. What a group stands for is differentiable in the numbers (scales, zeros, codebooks), which are
trained in units of their root mean square, so that one step size suits all of them.

Shapes: O output rows, I input columns, N code groups of a matrix, W columns of one, M codes of one, G groups with a
common scale, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait import ops
from plait.errors import IncompatibleError
from plait.weights.coded import Coded, from_groups, half
from plait.weights.db_llm import guarded
from plait.weights.format import Packed

__all__ = ["Tunable", "TunableCodes", "tunable"]

# Zeros of groups whose scale nearly vanishes stay within fp16.
_FARTHEST_ZERO = 65000.0


class Tunable(Packed):
    """A matrix that is trained, made of one that is packed. To add a kind: `Packed.tunable` returns one.

    Args:
        shape: (O, I).
        format: for people.
        numbers: what is trained, by name.

    Attributes:
        width: W.
        codes: uint8 (N, M), a buffer.
    """

    codes: Tensor
    width: int = 1

    def __init__(self, shape: tuple[int, int], format: str, numbers: Mapping[str, Tensor]) -> None:
        super().__init__(shape, format)
        self._seen: Tensor | None = None
        for name, tensor in numbers.items():
            unit = tensor.float().square().mean().sqrt() if tensor.numel() else torch.ones(())
            unit = torch.where(unit > 0, unit, 1.0)
            self.register_buffer(f"unit_{name}", unit)
            self.register_parameter(name, nn.Parameter(tensor.float() / unit, requires_grad=True))

    def number(self, name: str) -> Tensor:
        """A number that is trained, in its own unit; differentiable."""
        trained, unit = getattr(self, name), getattr(self, f"unit_{name}")
        assert isinstance(trained, Tensor)
        assert isinstance(unit, Tensor)
        return trained * unit

    def dense(self) -> Tensor:
        """The whole matrix, (O, I) fp32; differentiable in the numbers."""
        raise NotImplementedError

    def nearest(self, target: Tensor, groups: Tensor) -> Tensor:
        """Codes uint8 (n, M) that come near `target` (n, W) in the chosen groups (n,), none farther than those they have.

        A group keeps its codes unless others are nearer.
        """
        raise NotImplementedError

    def decoded(self, codes: Tensor, groups: Tensor) -> Tensor:
        """What codes (n, M) would stand for in the chosen groups (n,): (n, W)."""
        raise NotImplementedError

    def packed(self) -> Packed:
        """The matrix as it is stored, its numbers rounded as its format keeps them."""
        raise NotImplementedError

    @property
    def gradient(self) -> Tensor | None:
        """Of the loss in the dense matrix, (O, I), after a backward pass; None before."""
        return None if self._seen is None else self._seen.grad

    def forget(self) -> None:
        """Let go of the dense matrix of the last pass, and of its gradient."""
        self._seen = None

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        return self.dense()[rows]

    def matmul(self, x: Tensor) -> Tensor:
        dense = self.dense()
        if dense.requires_grad:
            dense.retain_grad()
            self._seen = dense
        return ops.linear(x, dense)


def tunable(packed: Packed, name: str) -> Tunable:
    """A packed matrix in the form in which it is tuned.

    Raises:
        IncompatibleError: its kind is not tuned.
    """
    made = packed.tunable()
    if made is None:
        raise IncompatibleError(
            f"{name} is in {packed.format}, which is not tuned. Pack the model in a format of codes first, such as db-llm, "
            "decoupleq, gptq, uniform, bitmod or vq."
        )
    assert isinstance(made, Tunable)
    return made


class TunableCodes(Tunable):
    """A matrix with a code for every weight: in each group of columns, a code stands for one of L levels.

    Trained are scales and shifts of evenly spaced levels, both scales of planes, and the scales of tables: those of rows
    where there are such, while 8-bit steps and the choice of a special value stay.
    """

    def __init__(self, matrix: Coded) -> None:
        grid = matrix.grid
        scales = matrix.per_group(matrix.scales)
        numbers = {"scale": scales.float()}
        steps: Tensor | None = None
        if matrix.row_scales is not None:
            steps = scales.float()
            numbers = {"scale": matrix.row_scales.reshape(-1)[: matrix.shape[0], None]}
        if matrix.low_scales is not None:
            numbers["low"] = matrix.per_group(matrix.low_scales).float()
        if matrix.zeros is not None:
            numbers["shift"] = -numbers["scale"] * matrix.per_group(matrix.zeros).float()
        super().__init__(matrix.shape, matrix.format, numbers)
        self.grid, self.group = grid, matrix.group
        size = matrix.group or max(1, matrix.shape[1])
        self.register_buffer("codes", matrix.code_rows().reshape(-1, 1))
        self.register_buffer("steps", steps)
        types = None if matrix.types is None else matrix.type_rows()
        self.register_buffer("types", types)
        self._group_of = torch.arange(matrix.shape[1]) // size

    def levels(self) -> Tensor:
        """What each code stands for, (O, G, L); differentiable."""
        scale = self.number("scale")[..., None]
        count = 1 << self.grid.bits
        if self.grid.has_planes:
            low = self.number("low")[..., None]
            return scale * torch.tensor([0.0, 0.0, 1.0, 1.0]) + low * torch.tensor([0.0, 1.0, 0.0, 1.0])
        if not self.grid.values:
            steps = torch.arange(count, dtype=torch.float32)
            shifts = "shift" in self._parameters
            return scale * steps + self.number("shift")[..., None] if shifts else scale * (steps - count // 2)
        table = torch.tensor(self.grid.values, dtype=torch.float32)
        kinds, held = self._buffers["types"], self._buffers["steps"]
        if kinds is not None:
            special = torch.tensor(self.grid.specials, dtype=torch.float32)[kinds.long()]
            table = torch.cat([table[:-1].expand(*special.shape, -1), special[..., None]], dim=-1)
        return scale * (table if held is None else held[..., None] * table)

    def dense(self) -> Tensor:
        looked: Tensor = _Looked.apply(  # type: ignore[no-untyped-call]
            self.levels(), self.codes.view(self.shape), self._group_of
        )
        return looked

    @torch.no_grad()
    def nearest(self, target: Tensor, groups: Tensor) -> Tensor:
        levels, places = self.levels().flatten(0, 1), self._places_of(groups)
        wanted, best = target[:, 0], self.codes[groups, 0]
        error = (levels.flatten().take(places * levels.shape[1] + best) - wanted).abs_()
        for code in range(self.grid.num_codes):
            other = (levels[:, code].take(places) - wanted).abs_()
            best = torch.where(other < error, code, best)
            error = torch.minimum(error, other)
        return best.to(torch.uint8)[:, None]

    @torch.no_grad()
    def decoded(self, codes: Tensor, groups: Tensor) -> Tensor:
        levels = self.levels()
        return levels.take(self._places_of(groups)[:, None] * levels.shape[2] + codes)

    def _places_of(self, groups: Tensor) -> Tensor:
        """Which of the O G groups with a common scale each weight is in."""
        columns = self.shape[1]
        count = int(self._group_of[-1]) + 1 if columns else 0
        return groups.div(columns, rounding_mode="floor") * count + self._group_of[groups % columns]

    @torch.no_grad()
    def packed(self) -> Coded:
        codes, scale = self.codes.view(self.shape), self.number("scale")
        if self.grid.has_planes:
            high, low = guarded(scale, self.number("low"))
            return from_groups(
                self.grid,
                self.group,
                codes,
                half(high, "Scales"),
                low_scales=half(low, "Scales"),
            )
        kinds, held = self._buffers["types"], self._buffers["steps"]
        if held is not None:
            return from_groups(
                self.grid, self.group, codes, held.to(torch.uint8), types=kinds, row_scales=scale[:, 0]
            )
        zeros: Tensor | None = None
        if "shift" in self._parameters:
            rounded = half(scale, "Scales").float()
            safe = torch.where(rounded == 0, 1.0, rounded)
            zeros = half((-self.number("shift") / safe).clamp(-_FARTHEST_ZERO, _FARTHEST_ZERO), "Zeros")
        return from_groups(self.grid, self.group, codes, half(scale, "Scales"), zeros=zeros, types=kinds)


class _Looked(torch.autograd.Function):
    """Levels (O, G, L) at the places that codes (O, I) name; the gradient of a level is the sum over its weights."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, codes: Tensor, group_of: Tensor) -> Tensor:
        ctx.shape, ctx.codes, ctx.group_of = levels.shape, codes, group_of
        return levels.flatten(1).gather(1, _places(levels.shape, codes, group_of))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].new_zeros(ctx.shape[0], ctx.shape[1] * ctx.shape[2])
        total.scatter_add_(1, _places(ctx.shape, ctx.codes, ctx.group_of), gradients[0])
        return total.view(ctx.shape), None, None


def _places(shape: torch.Size, codes: Tensor, group_of: Tensor) -> Tensor:
    return codes.long() + shape[2] * group_of
