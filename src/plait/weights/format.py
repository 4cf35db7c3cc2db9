"""How the parameters of a matrix are stored, and how they are multiplied as stored.

Shapes: O output rows, I input columns, N rows of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from plait import ops
from plait.errors import ConfigError, IncompatibleError
from plait.spec import Axis, Spec
from plait.weights.stats import Stats

__all__ = [
    "FORMATS",
    "PACKED_KINDS",
    "BlockRun",
    "Dense",
    "Elastic",
    "Embedding",
    "Linear",
    "ModelRun",
    "Packed",
    "Stacked",
    "WeightFormat",
    "check_matrix",
    "take_tensors",
]

FORMATS = Axis("weight format")
# Kinds of packed matrices that files may hold, by name.
PACKED_KINDS: dict[str, type[Packed]] = {}
# Weights of a matrix that are dense at once while it is multiplied: 64 MB in fp32.
_MATMUL_CHUNK = 1 << 24


class Packed(nn.Module):
    """A matrix of shape (O, I) in the form in which it is kept in memory.

    `unpack` defines what the matrix *is*; `matmul` must equal `x @ unpack().T` within the bound
    that the format states. Subclasses implement `unpack_rows` and may override `matmul`; those with a `kind`
    can be written to a file, and implement `tensors`, `settings` and `from_tensors`.
    """

    kind: ClassVar[str | None] = None
    shape: tuple[int, int]
    format: str
    native: ops.PackedMatrix | None

    def __init_subclass__(cls, *, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        if kind is not None:
            assert kind not in PACKED_KINDS, f"two kinds {kind!r}"
            PACKED_KINDS[kind] = cls

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
        """Multiply activations x (..., I) by the transpose of this matrix: (..., O).

        At most 64 MB of the matrix are dense at a time.
        """
        step = max(1, _MATMUL_CHUNK // max(1, self.shape[1]))
        parts = [
            ops.linear(x, self.unpack_rows(slice(start, start + step)).to(x.dtype))
            for start in range(0, max(1, self.shape[0]), step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a file must keep of this matrix, by the names of its parts."""
        raise IncompatibleError(f"A matrix in {self.format} cannot be written to a file.")

    def settings(self) -> dict[str, Any]:
        """What the tensors do not say, as JSON holds it."""
        return {}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Self:
        """The matrix that `tensors` and `settings` describe; the tensors are kept without a copy.

        Raises:
            ConfigError: parts or settings that do not belong together.
        """
        raise IncompatibleError(f"{cls.__name__} cannot be read from a file.")

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

    def tunable(self) -> Packed | None:
        """A `plait.weights.Tunable` of the same values, or None where this kind has none."""
        return None

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


class Dense(Packed, kind="dense"):
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

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.weight.detach()}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Self:
        take_tensors(tensors, {"values": (shape, (torch.float32, torch.float16, torch.bfloat16))})
        return cls(tensors["values"])

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

    Attributes:
        packs_embeddings: whether a model that is kept in this format has its embedding and head in it too;
            formats of few bits leave those as they are, unless another format is chosen for them.
    """

    packs_embeddings: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """What `pack` must be told about the inputs of a matrix: a subset of `norms`, `hessian` and `block_io`.

        See `Stats`. Nothing for formats that look at the weights only.
        """
        return frozenset()

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Bits kept for each weight of a matrix of this shape, counting scales, tables and padding."""
        raise NotImplementedError

    def pack(self, weight: Tensor, stats: Stats | None = None) -> Packed:
        """Store a dense matrix (O, I) in this format. Never changes `weight`.

        Args:
            stats: what its inputs look like; must hold what `needs` names.
        """
        raise NotImplementedError

    def input_factors(self, weights: Sequence[Tensor], stats: Stats) -> Tensor | None:
        """Positive factors (I,) by which the columns of matrices with common inputs are multiplied first.

        Whoever makes the inputs is divided by them, so that the model stays the same. None for no change.
        """
        return None

    def refine(self, block: nn.Module, run: BlockRun) -> None:
        """Tune the packed matrices of a whole block in place; called where `needs` has `block_io`."""

    def stack_order(self, run: ModelRun) -> list[str] | None:
        """For formats that pack a matrix into blocks of which the first few will do: in which order they are loaded.

        Returns:
            The matrix that gets a further block, again and again until all are whole; None for other formats.
        """
        return None


class Elastic(WeightFormat):
    """Formats whose files hold more than is loaded: the first blocks of every matrix, and a stack of others.

    Attributes:
        budget: bytes of the whole model, such as `64MB`; empty for no limit.
        bits: bits for each weight of the stack; None for no limit.
    """

    budget: str
    bits: float | None


class BlockRun(Protocol):
    """How a block is run on the calibration text, one sequence at a time."""

    def __len__(self) -> int:
        """Number of sequences."""
        ...

    def output(self, index: int) -> Tensor:
        """What the block, as it is now, makes of sequence `index`: (tokens, width); gradients flow."""
        ...

    def target(self, index: int) -> Tensor:
        """What the block made of it before any of its matrices were packed."""
        ...


class ModelRun(Protocol):
    """How a whole packed model is run on calibration text."""

    @property
    def matrices(self) -> Mapping[str, Packed]:
        """The matrices of the blocks by name, in the order of the network."""
        ...

    def loss(self, changed: str | None = None) -> float:
        """Mean nats of the next token.

        Where only matrix `changed` differs from what it was in the last call without one, what comes before its
        block is not computed again.
        """
        ...

    def sensitivity(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Of each matrix, mean squares of its inputs (I,) and sums of squared slopes of the loss in its outputs (O,).

        fp64, of the model as it is.
        """
        ...


class Linear(nn.Module):
    """`y = x W^T + b` with W in any format.

    Args:
        weight: the matrix, (O, I).
        bias: (O,) or None.

    Attributes:
        hook: computes y from x, the plain product and what the branch read that this product ends, for rows that have
            adapters; None for the product alone.
    """

    weight: Packed

    def __init__(self, weight: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=torch.is_grad_enabled())
        self.hook: Callable[[Tensor, Callable[[Tensor], Tensor], Tensor | None], Tensor] | None = None

    def forward(self, x: Tensor, entry: Tensor | None = None) -> Tensor:
        """`x W^T + b`; `entry` is what the branch read that this product ends, for adapters beside all of it."""
        return self.product(x) if self.hook is None else self.hook(x, self.product, entry)

    def product(self, x: Tensor) -> Tensor:
        """The product itself, whatever `hook` makes of it."""
        if torch.is_grad_enabled() and x.requires_grad:
            parts = [frozen_matmul(x, part) for part in self.weight.pieces()]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        else:
            y = self.weight.matmul(x)
        return y if self.bias is None else y + self.bias


class _Frozen(torch.autograd.Function):
    """A product with a packed matrix whose gradient unpacks a part of it at a time, and keeps none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return packed.matmul(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        packed, gradient = ctx.packed, gradients[0]
        step = max(1, _MATMUL_CHUNK // max(1, packed.shape[1]))
        total: Tensor | None = None
        for start in range(0, packed.shape[0], step):
            rows = packed.unpack_rows(slice(start, start + step)).to(gradient.dtype)
            part = gradient[..., start : start + step] @ rows
            total = part if total is None else total.add_(part)
        return gradient.new_zeros(*gradient.shape[:-1], packed.shape[1]) if total is None else total, None


def frozen_matmul(x: Tensor, packed: Packed) -> Tensor:
    """`packed.matmul(x)` with a gradient for x; a matrix that is not trained is never dense as a whole for it."""
    if isinstance(packed, Dense) or any(parameter.requires_grad for parameter in packed.parameters()):
        return packed.matmul(x)
    found: Tensor = _Frozen.apply(x, packed)  # type: ignore[no-untyped-call]
    return found


class Embedding(nn.Module):
    """Rows of a matrix by id. Shares its matrix with a tied output head."""

    weight: Packed

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.unpack_rows(ids)


def check_matrix(format: str, weight: Tensor) -> None:
    """Refuse what is not a matrix of floating-point numbers.

    Raises:
        ConfigError: another number of dimensions or another type.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ConfigError(
            f"{format} packs matrices of floating-point numbers."
            f" Got shape {tuple(weight.shape)} of {weight.dtype}."
        )


def take_tensors(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]],
) -> None:
    """Check that exactly these parts are there, each of its shape and of one of its types.

    Raises:
        ConfigError: a part is missing, superfluous, or of another shape or type.
    """
    if tensors.keys() != wanted.keys():
        raise ConfigError(f"it has the parts {sorted(tensors)} and needs {sorted(wanted)}")
    for name, (shape, dtypes) in wanted.items():
        given = tensors[name]
        if tuple(given.shape) != tuple(shape) or given.dtype not in dtypes:
            raise ConfigError(
                f"its {name} are {given.dtype} of shape {tuple(given.shape)}"
                f" and must be {' or '.join(str(dtype) for dtype in dtypes)} of shape {tuple(shape)}"
            )
