"""The native form of the primitives: C++ on a CPU, with one fixed order of every sum.

A row's result has the same bits alone, in any batch, in any chunk of its prefill and with any number of
threads, and the same on every instruction set of a processor with fused multiply-add. It equals the reference
up to fp32 rounding; packed products also round their activations to 8 bits (see `PackedMatrix`).

Switches, read once: `PLAIT_NATIVE=0` turns it off. Left out, packed matrices and models made of them are
native, and single operations on plain numbers stay with torch, whose threads would wait for those of the
extension when both work in turns; `PLAIT_NATIVE=1` makes every operation native. `PLAIT_NATIVE_ISA` (`avx512`,
`avxvnni`, `avx2`; on ARM `dotprod`, `neon`; `scalar`) forces an instruction set; `PLAIT_THREADS` sets the number of
threads, the physical cores when left out.

Shapes: N rows, I inputs, O outputs; Q queries, T keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.ops.distance_bias import DistanceBias
from plait.ops.masks import Causal, Everything, Mask, Tree
from plait.ops.partial import Partial
from plait.ops.rope import Angles

__all__ = [
    "ACTIVATIONS",
    "NUMBERS",
    "PACKED_FORMATS",
    "ExactMatrix",
    "PackedMatrix",
    "Projection",
    "extension",
    "feed_forward",
    "has_native_matrices",
    "has_packed_form",
    "is_everywhere",
    "linear",
    "mask_kind",
    "merge",
    "module",
    "partial_attention",
    "program",
    "rms_norm",
    "rotate",
    "takes",
    "tree_bits",
]

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
PACKED_FORMATS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASKS: dict[type[Mask], int] = {Everything: 0, Causal: 1, Tree: 2}


@cache
def module() -> ModuleType | None:
    """The extension module, or None when it is switched off or was not built (said once, in the log)."""
    if _switch() == "0":
        return None
    try:
        _native = importlib.import_module("plait._native")
    except ImportError as error:
        logging.getLogger("plait").warning(
            "The native operations are not available (%s). The torch reference is used: several times slower on "
            "a CPU, more memory for packed weights, and rows that depend on their batch in the last bits. Install "
            "a C++ compiler and reinstall plait to have them, or set PLAIT_NATIVE=0.",
            error,
        )
        return None
    try:
        _native.isa()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _native


@cache
def _switch() -> str:
    switch = os.environ.get("PLAIT_NATIVE", "auto")
    if switch not in ("0", "1", "auto"):
        raise ConfigError(f"PLAIT_NATIVE must be 0, 1 or auto. Got {switch!r}.")
    return switch


@cache
def is_everywhere() -> bool:
    """Whether single operations on plain numbers are native too."""
    return _switch() == "1" and module() is not None


def takes(arguments: Iterable[Any]) -> bool:
    """Whether the native form can compute on these arguments: floats on the CPU, with no gradient asked for.

    It knows plain, causal and tree masks, and no bias by distance.
    """
    needs_grad = torch.is_grad_enabled()
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.device.type != "cpu" or argument.dtype not in NUMBERS:
                return False
            if needs_grad and argument.requires_grad:
                return False
        elif isinstance(argument, Partial):
            if not takes(argument):
                return False
        elif isinstance(argument, Angles):
            if not takes((argument.cos, argument.sin)):
                return False
        elif isinstance(argument, DistanceBias) or (
            isinstance(argument, Mask) and type(argument) not in _MASKS
        ):
            return False
    return True


def extension() -> Any:
    """The extension module, where the caller has asked whether there is one."""
    found = module()
    assert found is not None
    return found


def has_native_matrices() -> bool:
    """Whether `GridMatrix`, `StackMatrix` and `AdditiveMatrix` can be made."""
    return module() is not None


def mask_kind(mask: Mask) -> int:
    """The number by which the extension knows a mask."""
    return _MASKS[type(mask)]


def _rows(x: Tensor) -> Tensor:
    """x (..., I) as fp32 rows (N, I), numbers of a row side by side; a copy only where needed."""
    rows = x.detach().float().reshape(-1, x.shape[-1])
    return rows if rows.shape[1] < 2 or rows.stride(1) == 1 else rows.contiguous()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` with fp32 sums: x (..., I), weight (O, I) -> (..., O) in x's dtype."""
    rows = _rows(x)
    weight = weight.detach()
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    y = torch.empty(rows.shape[0], weight.shape[0])
    extension().linear_dense(rows, weight, None, y)
    return y.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last axis."""
    rows = _rows(x)
    y = torch.empty(rows.shape)
    extension().rms_norm(rows, weight.detach().float().contiguous(), epsilon, y)
    return y.view(x.shape).to(x.dtype)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn the first R channels of x (N, H, D) by each row's angles, or one for all; the reference to rounding."""
    wide = x.detach().float()
    if wide.stride(-1) != 1:
        wide = wide.contiguous()
    y = torch.empty(x.shape)
    cos, sin = (turn.expand(len(x), -1).contiguous() for turn in (angles.cos, angles.sin))
    extension().rotate(wide, cos, sin, y)
    return y.to(x.dtype)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint parts, from the attention over each."""
    out, lse = torch.empty(a.out.shape), torch.empty(a.lse.shape)
    width = a.out.shape[-1]
    flat = [t.detach().float().reshape(-1, width) for t in (a.out, b.out)]
    sums = [t.detach().float().reshape(-1) for t in (a.lse, b.lse)]
    extension().merge(flat[0], sums[0], flat[1], sums[1], out.view(-1, width), lse.view(-1))
    return Partial(out, lse)


def partial_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    mask: Mask | None = None,
    first_query: int = 0,
    first_key: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    bias: None = None,
) -> Partial:
    """Attention of every query over these keys, as a part that can be merged with others.

    Sums over keys run in chunks of 256 positions from multiples of 256; `first_key` says where the keys stand.
    A bias by distance is refused by `takes`; layers without one pass None.
    """
    num_queries, num_heads, head_dim = q.shape
    out = torch.empty(num_queries, num_heads, values.shape[2])
    lse = torch.empty(num_queries, num_heads)
    mask = mask or Everything()
    depths = ancestors = None
    if isinstance(mask, Tree):
        depths, ancestors = mask.depths(num_queries).contiguous(), tree_bits(mask)
    q = q.detach().float()
    if q.stride(2) != 1 or (num_heads > 1 and q.stride(1) != head_dim):
        q = q.contiguous()
    keys, values = (t.detach() if t.stride(-1) == 1 else t.detach().contiguous() for t in (keys, values))
    if keys.dtype != values.dtype:
        keys, values = keys.float(), values.float()
    extension().partial_attention(
        q, keys, values, scale, _MASKS[type(mask)], first_query, first_key, window or 0, softcap or 0.0,
        depths, ancestors, out, lse,
    )  # fmt: skip
    return Partial(out, lse)


def tree_bits(mask: Tree) -> Tensor:
    """The ancestors of each node of a draft tree as bits: (n, ceil(n / 64)) int64, bit j of a row is node j."""
    count = len(mask.parents)
    padded = torch.zeros(count, (count + 63) // 64 * 64, dtype=torch.int64)
    padded[:, :count] = mask.ancestors
    # Each bit is set once, so the sum never carries; bit 63 makes the number negative, as it should.
    return (padded.view(count, -1, 64) << torch.arange(64)).sum(dim=2)


class PackedMatrix:
    """A low-bit matrix in tiles that the processor streams: made once from GGML blocks, which may then be freed.

    `unpack_rows` gives exactly the values of the blocks. `matmul` rounds each block of 32 activations to whole
    multiples of (largest magnitude of the block) / 127, multiplies in exact integers and adds in fp32: an
    output differs from `x @ unpack().T` by at most half such a step times the sum of the weights' magnitudes in
    the block, summed over blocks, plus fp32 rounding.

    Args:
        blocks: uint8, (O, bytes per row).
        format: name of the GGML format.
    """

    def __init__(self, blocks: Tensor, format: str) -> None:
        self.handle = extension().PackedMatrix(blocks.contiguous(), format)
        self.shape: tuple[int, int] = self.handle.shape
        self._whole = Projection([self])

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedMatrix:
        # It never changes, so a copy of what holds it can share it.
        return self

    def nbytes(self) -> int:
        """Bytes held: codes, scales and minima, rows padded to a multiple of 16."""
        return int(self.handle.nbytes())

    def unpack_rows(self, rows: Tensor) -> Tensor:
        """The rows with these numbers in fp32, (*rows.shape, I)."""
        out = torch.empty(*rows.shape, self.shape[1])
        self.handle.unpack_rows(rows.reshape(-1).to(torch.int64), out.view(-1, self.shape[1]))
        return out

    def matmul(self, x: Tensor) -> Tensor:
        """x (..., I) times the transpose of this matrix: (..., O)."""
        return self._whole(x)


class ExactMatrix(PackedMatrix):
    """A matrix whose tensors are borrowed, and which can be multiplied in fp32 too; see the kinds of it."""

    # The extension's operation that does so.
    _exact: ClassVar[str]

    def matmul_exact(self, x: Tensor) -> Tensor:
        """x (..., I) times the transpose of this matrix, in fp32: (..., O)."""
        rows = _rows(x)
        y = torch.empty(rows.shape[0], self.shape[0])
        getattr(extension(), self._exact)(self.handle, rows, y)
        return y.view(*x.shape[:-1], self.shape[0]).to(x.dtype)


def has_packed_form(blocks: Tensor, format: str) -> bool:
    """Whether `PackedMatrix` can be made of these blocks: not without the extension, nor off the CPU."""
    return module() is not None and blocks.device.type == "cpu" and format in PACKED_FORMATS


class Projection:
    """Packed matrices on top of each other that read the same rows, with an optional bias.

    Args:
        parts: matrices with the same number of columns, whole or as `(matrix, first row, rows)` with the first
            row a multiple of 16.
        bias: (O,) or None.
    """

    def __init__(
        self, parts: Sequence[PackedMatrix | tuple[PackedMatrix, int, int]], bias: Tensor | None = None
    ) -> None:
        pieces = [part if isinstance(part, tuple) else (part, 0, part.shape[0]) for part in parts]
        added = None if bias is None else bias.detach().float().contiguous()
        self.handle = extension().Projection(
            [(matrix.handle, first, rows) for matrix, first, rows in pieces], added
        )
        self.shape: tuple[int, int] = self.handle.shape

    def __call__(
        self, x: Tensor, norm_weight: Tensor | None = None, epsilon: float = 0.0, onto: Tensor | None = None
    ) -> Tensor:
        """`x W^T + b`, of rows that are first normalised (RMS) when a norm weight is given.

        Args:
            x: (..., I).
            onto: (..., O) fp32, contiguous: the result is added to it in place, and it is returned.
        """
        rows = _rows(x)
        y = torch.empty(rows.shape[0], self.shape[0]) if onto is None else onto.view(-1, self.shape[0])
        extension().project(self.handle, rows, y, onto is not None, _norm(norm_weight), epsilon)
        return y.view(*x.shape[:-1], self.shape[0]).to(x.dtype) if onto is None else onto


def feed_forward(
    x: Tensor,
    gate: Projection | None,
    up: Projection,
    down: Projection,
    activation: str,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    onto: Tensor | None = None,
) -> Tensor:
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))`, in one call; see `Projection`.

    Args:
        activation: `silu`, `gelu_tanh`, `gelu` or `relu`.
    """
    rows = _rows(x)
    width = down.shape[0]
    y = torch.empty(rows.shape[0], width) if onto is None else onto.view(-1, width)
    extension().feed_forward(
        None if gate is None else gate.handle, up.handle, down.handle, ACTIVATIONS[activation], rows, y,
        onto is not None, _norm(norm_weight), epsilon,
    )  # fmt: skip
    return y.view(*x.shape[:-1], width).to(x.dtype) if onto is None else onto


def program(width: int, epsilon: float, final_norm: Tensor | None, head: Any) -> Any:
    """An empty decoder of the extension, to which layers are added; `head` is the handle of a `Projection`."""
    return extension().Program(width, epsilon, final_norm, head)


def _norm(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().contiguous()
