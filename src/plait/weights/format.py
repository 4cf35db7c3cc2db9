"""How the parameters of a matrix are stored, and how they are multiplied as stored.

Shapes: O output rows, I input columns, N rows of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait import ops
from plait.errors import ConfigError, IncompatibleError
from plait.spec import Axis, Spec

__all__ = ["FORMATS", "Dense", "Embedding", "Linear", "Packed", "Stacked", "WeightFormat"]

FORMATS = Axis("weight format")


class Packed(nn.Module):
    """A matrix of shape (O, I) in the form in which it is kept in memory.

    `unpack` defines what the matrix *is*; `matmul` must equal `x @ unpack().T` within the bound
    that the format states. Subclasses implement `unpack_rows` and may override `matmul`.
    """

    shape: tuple[int, int]
    format: str
    native: ops.PackedMatrix | None

    def __init__(self, shape: tuple[int, int], format: str) -> None:
        super().__init__()
        self.native = None
        self.shape = (int(shape[0]), int(shape[1]))
        self.format = format

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        """The chosen rows as a dense fp32 matrix, (len(rows), I)."""
        raise NotImplementedError

    def unpack(self) -> Tensor:
        """The whole matrix, dense, (O, I)."""
        return self.unpack_rows(slice(None))

    def matmul(self, x: Tensor) -> Tensor:
        """Multiply activations x (..., I) by the transpose of this matrix: (..., O)."""
        return ops.linear(x, self.unpack().to(x.dtype))

    @property
    def has_native_form(self) -> bool:
        """Whether `to_native` can be called."""
        return self.native is not None

    def to_native(self) -> ops.PackedMatrix:
        """Keep the matrix in native form from now on, in place of the tensors that it was made of."""
        raise IncompatibleError(f"A matrix in {self.format} has no native form.")

    def select(self, rows: Tensor) -> Packed:
        """The chosen rows, in the order given, as a matrix of the same form; (len(rows), I)."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes held by this matrix: every code, scale, table and index."""
        tensors = {t.untyped_storage().data_ptr(): t for t in [*self.parameters(), *self.buffers()]}
        natives = [m.native for m in self.modules() if isinstance(m, Packed) and m.native is not None]
        return sum(t.numel() * t.element_size() for t in tensors.values()) + sum(n.nbytes() for n in natives)

    def pieces(self) -> list[Packed]:
        """The matrices that this one is made of, from top to bottom: itself, unless it is stacked."""
        return [self]

    def extra_repr(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.format}"


class Dense(Packed):
    """A matrix kept as plain floating-point numbers; the only trainable form.

    Args:
        weight: (O, I), any floating dtype; kept without a copy.
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), str(weight.dtype).removeprefix("torch."))
        self.weight = nn.Parameter(
            weight, requires_grad=torch.is_grad_enabled() and weight.is_floating_point()
        )

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        return self.weight[rows]

    def select(self, rows: Tensor) -> Dense:
        return Dense(self.weight.detach()[rows])

    def matmul(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)


class Stacked(Packed):
    """Several packed matrices on top of each other, such as query, key and value projections.

    Args:
        parts: matrices with the same number of columns; row blocks in this order.

    Raises:
        ConfigError: the numbers of columns differ, or there is no part.
    """

    def __init__(self, parts: Sequence[Packed]) -> None:
        columns = {part.shape[1] for part in parts}
        if len(columns) != 1:
            raise ConfigError(
                f"Stacked matrices must have the same number of columns. Got {sorted(columns)}."
            )
        super().__init__(
            (sum(part.shape[0] for part in parts), columns.pop()),
            "+".join(dict.fromkeys(part.format for part in parts)),
        )
        self.parts = nn.ModuleList(parts)

    def pieces(self) -> list[Packed]:
        """The matrices, from top to bottom."""
        return [part for part in self.parts if isinstance(part, Packed)]

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        return torch.cat([part.unpack() for part in self.pieces()])[rows]

    def matmul(self, x: Tensor) -> Tensor:
        return torch.cat([part.matmul(x) for part in self.pieces()], dim=-1)


class WeightFormat(Spec, axis=FORMATS):
    """A way to store matrices, such as `fp32` or `q4_0`; a value object.

    To add one: one file in `plait/weights/` with a frozen dataclass that derives from this class
    and a `Packed` that it makes, and one import in `plait/weights/__init__.py`.
    """

    def bits(self, shape: tuple[int, int]) -> float:
        """Bits kept for each weight of a matrix of this shape, counting scales, tables and padding."""
        raise NotImplementedError

    def pack(self, weight: Tensor, calibration: Any = None) -> Packed:
        """Store a dense matrix (O, I) in this format. Never changes `weight`."""
        raise NotImplementedError


class Linear(nn.Module):
    """`y = x W^T + b` with W in any format.

    Args:
        weight: the matrix, (O, I).
        bias: (O,) or None.
    """

    weight: Packed

    def __init__(self, weight: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=torch.is_grad_enabled())

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.matmul(x)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """Rows of a matrix by id. Shares its matrix with a tied output head."""

    weight: Packed

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.unpack_rows(ids)
