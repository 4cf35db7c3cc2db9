"""Binary layers as they are stored and run: one bit a weight, and where inputs are binary, sums of bits that differ.

Shapes: N samples, O outputs, C inputs, K taps of a window, I = C K columns, S dimensions of space, W words.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait import ops
from plait.errors import ConfigError, IncompatibleError
from plait.weights.binary.base import Rule
from plait.weights.binary.layers import Window, binary_layers, finished
from plait.weights.format import Packed, take_tensors
from plait.weights.stacked_blocks import BlockStack, SignedBlock, join_block

__all__ = ["BinaryMatrix", "PackedBinary", "export"]

Model = TypeVar("Model", bound=nn.Module)
_MAX_COLUMNS, _MAX_ROWS = 1 << 20, 1 << 28


class BinaryMatrix(Packed, kind="binary"):
    """A matrix whose row o holds s_o and -s_o: a bit for each weight and a number for each row.

    Args:
        shape: (O, I).
        taps: K, which divides I; column c K + k is tap k of input c, as torch has them.
        signs: uint8 (O, K, ceil(C / 8)), bit by bit from the lowest, set where a weight is negative.
        scales: fp32 (O,).

    Raises:
        ConfigError: tensors that do not fit together.
    """

    signs: Tensor
    scales: Tensor

    def __init__(self, shape: tuple[int, int], taps: int, signs: Tensor, scales: Tensor) -> None:
        super().__init__(shape, "binary")
        rows, columns = self.shape
        if not (0 <= rows <= _MAX_ROWS and 0 <= columns <= _MAX_COLUMNS) or taps < 1 or columns % taps:
            raise ConfigError(f"its shape is {shape} with {taps} taps, which is not that of a matrix")
        self.taps = taps
        take_tensors(
            {"signs": signs, "scales": scales},
            {
                "signs": ((rows, taps, -(-self.inputs // 8)), (torch.uint8,)),
                "scales": ((rows,), (torch.float32,)),
            },
        )
        self.register_buffer("signs", signs)
        self.register_buffer("scales", scales)
        self._bit_matrix: ops.BitMatrix | None = None
        self._planes: BlockStack | None = None

    @classmethod
    def of(cls, signs: Tensor, scales: Tensor | None = None, taps: int = 1) -> Self:
        """The matrix `scales * signs`, where signs (O, I) are -1 or 1; scales (O,), None for 1.

        Raises:
            IncompatibleError: signs that are something else.
        """
        if not torch.equal(signs.abs(), torch.ones_like(signs)):
            raise IncompatibleError("The signs of a binary matrix are -1 or 1. These are not.")
        by_tap = (signs < 0).view(len(signs), -1, taps).transpose(1, 2)
        # Words are whole; the bytes of a file stop where the inputs do.
        packed = ops.words_of_bits(by_tap).view(torch.uint8)[..., : -(-by_tap.shape[2] // 8)].contiguous()
        kept = torch.ones(len(signs)) if scales is None else scales.detach().float().clone()
        return cls((signs.shape[0], signs.shape[1]), taps, packed, kept)

    @property
    def inputs(self) -> int:
        """C."""
        return self.shape[1] // self.taps

    def unpack_rows(self, rows: Tensor | slice) -> Tensor:
        numbers = torch.arange(self.shape[0])[rows]
        bits = self._bits(numbers.reshape(-1)).transpose(1, 2).reshape(-1, self.shape[1])
        values = torch.where(bits.bool(), -1.0, 1.0) * self.scales[numbers.reshape(-1)][:, None]
        return values.view(*numbers.shape, self.shape[1])

    def matmul(self, x: Tensor) -> Tensor:
        """x (..., I) of any numbers times the transpose of this matrix: (..., O).

        Natively it is multiplied as a `BlockStack` of one block, whose scales are sums of two numbers of fp16.
        """
        planes = self._planes or self._as_planes()
        if planes is None or (torch.is_grad_enabled() and x.requires_grad):
            return super().matmul(x)
        self._planes = planes
        return planes.matmul(x)

    def bits(self) -> ops.BitMatrix:
        """The matrix in the form that meets binary inputs, tap by tap; made at the first call."""
        if self._bit_matrix is None:
            bits = self._bits(torch.arange(self.shape[0]))
            rows = ops.words_of_bits(bits).flatten(1)
            tiles = -(-len(rows) // ops.WORD_TILE)
            filled = rows.new_zeros(tiles * ops.WORD_TILE, rows.shape[1])
            filled[: len(rows)] = rows
            words = filled.view(tiles, ops.WORD_TILE, -1).transpose(1, 2)
            self._bit_matrix = ops.BitMatrix(words, self.shape[1], self.scales)
        return self._bit_matrix

    def select(self, rows: Tensor) -> BinaryMatrix:
        return BinaryMatrix((len(rows), self.shape[1]), self.taps, self.signs[rows], self.scales[rows])

    def nbytes(self) -> int:
        made = 0 if self._bit_matrix is None else self._bit_matrix.weight.nbytes
        return super().nbytes() + made + (0 if self._planes is None else self._planes.nbytes())

    def tensors(self) -> dict[str, Tensor]:
        return {"signs": self.signs, "scales": self.scales}

    def settings(self) -> dict[str, Any]:
        return {"taps": self.taps}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Self:
        taps = settings.get("taps")
        if type(taps) is not int or tensors.keys() != {"signs", "scales"}:
            raise ConfigError(
                f"it has {taps!r:.40} taps and the parts {sorted(tensors)}, not signs and scales"
            )
        return cls(shape, taps, tensors["signs"], tensors["scales"])

    def _bits(self, rows: Tensor) -> Tensor:
        """Bits of the chosen rows, uint8 (R, K, C)."""
        by_byte = self.signs[rows][..., None] >> torch.arange(8, dtype=torch.uint8)
        return (by_byte & 1).flatten(-2)[..., : self.inputs]

    def _as_planes(self) -> BlockStack | None:
        """The same matrix, to 22 bits of its scales, in the form for inputs of any numbers; None without one."""
        upper = self.scales.half()
        if not torch.isfinite(upper).all():
            return None
        is_negative = self._bits(torch.arange(self.shape[0])).transpose(1, 2).flatten(1).bool()
        u = torch.stack([upper, (self.scales - upper.float()).half()], dim=1)
        block = SignedBlock(is_negative, u, torch.ones(self.shape[1], 2, dtype=torch.float16))
        planes = BlockStack(self.shape, 2, [join_block(block)], 1)
        return planes if planes.has_native_form else None


class PackedBinary(nn.Module):
    """A binary layer whose training is over: bits of weights, and what the method keeps beside them.

    Args:
        matrix: the weights.
        rule: the method, in which nothing is left that only training needs.
        window: of a convolution.
        bias: (O,) or None.
        binary_inputs: whether inputs are binary.
    """

    def __init__(
        self, matrix: BinaryMatrix, rule: Rule, window: Window, bias: Tensor | None, binary_inputs: bool
    ) -> None:
        super().__init__()
        self.matrix, self.rule, self.window, self.binary_inputs = matrix, rule, window, binary_inputs
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, a: Tensor) -> Tensor:
        """Outputs (..., O) or (N, O, *S) of inputs (..., C) or (N, C, *S); no gradient passes binary inputs."""
        # A module looks its parts up slowly, beside what a small product takes.
        rule, matrix = self.rule, self.matrix
        place, dims = rule.place, len(self.window.kernel)
        if a.dim() <= dims or a.shape[place.channel_axis] != place.inputs:
            # Bits beyond a row would count as numbers of it.
            raise ConfigError(
                f"This layer takes {place.inputs} inputs on axis {place.channel_axis}. Got shape {tuple(a.shape)}."
            )
        if not self.binary_inputs:
            y = matrix.matmul(self._columns(a) if dims else a)
        elif dims:
            words = self._words(a)
            y = matrix.bits().product(words.flatten(0, -2)).view(*words.shape[:-1], -1)
        elif a.dim() == 2:
            y = matrix.bits().linear(a, rule.shift())
        else:
            y = matrix.bits().linear(a.reshape(-1, place.inputs), rule.shift()).view(*a.shape[:-1], -1)
        # In order, so that sums over it have theirs.
        y = y.movedim(-1, -1 - dims).contiguous() if dims else y
        return finished(rule, y, a if self.binary_inputs else None, self.bias)

    def _words(self, a: Tensor) -> Tensor:
        """The signs of inputs for every place of the window, (N, *S, K W)."""
        dims = len(self.window.kernel)
        last = a.movedim(-1 - dims, -1)
        words = ops.sign_words(last.reshape(-1, last.shape[-1]), self.rule.shift()).view(*last.shape[:-1], -1)
        # A padded place is +1, a bit of 0, like those beyond the last input.
        words = F.pad(words, (0, 0, *self.window.pads))
        places = [
            range(0, size - dilation * (kernel - 1), stride)
            for size, kernel, stride, dilation in zip(
                words.shape[1:-1], self.window.kernel, self.window.stride, self.window.dilation, strict=True
            )
        ]
        taps = []
        for tap in range(math.prod(self.window.kernel)):
            part = words
            for axis in reversed(range(dims)):
                tap, offset = divmod(tap, self.window.kernel[axis])
                start = offset * self.window.dilation[axis]
                stop = start + len(places[axis]) * self.window.stride[axis]
                part = part[(slice(None),) * (1 + axis) + (slice(start, stop, self.window.stride[axis]),)]
            taps.append(part)
        return torch.cat(taps, dim=-1)

    def _columns(self, a: Tensor) -> Tensor:
        """Inputs for every place of the window, (N, *S, I)."""
        padded = F.pad(a, self.window.pads)
        kernel, stride, dilation = self.window.kernel, self.window.stride, self.window.dilation
        if len(kernel) == 1:
            padded, kernel = padded[:, :, None], (1, *kernel)
            stride, dilation = (1, *stride), (1, *dilation)
        columns = F.unfold(padded, kernel, dilation, 0, stride).transpose(1, 2)
        space = [
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
        ]
        return columns.reshape(len(a), *(space[1:] if len(self.window.kernel) == 1 else space), -1)


def export(model: Model) -> Model:
    """A copy of a trained model whose binary layers are packed, on the CPU and in evaluation mode.

    Layers with binary inputs answer bit for bit what they answered, on this processor; others up to the order of fp32 sums.

    Raises:
        IncompatibleError: it has no binary layer, or one whose training is not over.
    """
    if not binary_layers(model):
        raise IncompatibleError("The model has no binary layer to pack. Make some with binarize, and train.")
    made = copy.deepcopy(model).cpu().eval()
    for name, layer in binary_layers(made).items():
        layer.rule.finish()
        with torch.no_grad():
            matrix = BinaryMatrix.of(layer.signs(), layer.scale(), layer.rule.place.taps)
        bias = None if layer.bias is None else layer.bias.detach()
        packed = PackedBinary(matrix, layer.rule, layer.window, bias, layer.binarizer.binary_inputs)
        parent, _, child = name.rpartition(".")
        setattr(made.get_submodule(parent), child, packed.eval())
    return made
