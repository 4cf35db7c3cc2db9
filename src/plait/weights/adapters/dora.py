"""DoRA: the direction of each row of a matrix is changed by LoRA, its length by one number.

Source: Liu et al. 2024, arXiv:2402.09353, equations 5 and 11: `y = m * (V x) / ||V||` with V = W + scale * B A,
the norm taken of each output row and held constant in the gradient.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.weights.adapters.base import Change, Delta, Matrix, check_shape
from plait.weights.adapters.lora import LoRA, LowRank, checked_pair

__all__ = ["DoRA"]

# Rows of a frozen matrix that are dense at once while norms are computed.
_ROWS_AT_ONCE = 512


class Directed(LowRank):
    """LoRA with a length for each row.

    Args:
        magnitude: m, (O,).
        matrix: that is changed.
    """

    peft_names: ClassVar[dict[str, str]] = {
        **LowRank.peft_names,
        "magnitude": "lora_magnitude_vector",
    }
    per_output: ClassVar[frozenset[str]] = frozenset({"up", "magnitude"})

    def __init__(
        self, down: Tensor, up: Tensor, magnitude: Tensor, scale: float, dropout: float, matrix: Matrix
    ) -> None:
        super().__init__(down, up, scale, dropout)
        self.magnitude = nn.Parameter(magnitude)
        self._matrix = matrix

    def delta(self) -> Delta:
        factor = self.magnitude / row_norms(self._matrix, self.up.detach() * self.scale, self.down.detach())
        bias = self._matrix.bias
        return Delta(
            down=self.down,
            up=self.up * self.scale * factor[:, None],
            output_scale=factor,
            # The bias of the frozen product has no direction: what scaling does to it is taken back.
            bias=None if bias is None else (1 - factor) * bias.detach(),
        )


@torch.no_grad()
def row_norms(matrix: Matrix, up: Tensor, down: Tensor) -> Tensor:
    """The length of each row of W + up down, (O,)."""
    norms = [
        (matrix.rows(slice(start, start + _ROWS_AT_ONCE)).float() + up[start : start + _ROWS_AT_ONCE] @ down)
        .norm(dim=1)
        for start in range(0, matrix.outputs, _ROWS_AT_ONCE)
    ]  # fmt: skip
    return torch.cat(norms).clamp(min=1e-12)


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA, name="dora"):
    """LoRA that also sets the length of each output row: often a little better at small ranks.

    Every training step computes the norms of all rows of the frozen matrices, which costs more than LoRA itself;
    for inference they are computed once. Settings are those of LoRA.
    """

    changes: ClassVar[type[Change]] = Directed

    def change(self, matrix: Matrix, generator: torch.Generator, shared: Mapping[str, Tensor]) -> Directed:
        plain = super().change(matrix, generator, shared)
        down, up = plain.down.detach(), plain.up.detach()
        length = row_norms(matrix, up * plain.scale, down)
        # The original is not held on to.
        made = Directed(down, up, length, plain.scale, self.dropout, matrix._replace(original=None))
        made.down.requires_grad_(plain.down.requires_grad)
        return made

    def restored(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Directed:
        down, up = checked_pair(matrix, tensors)
        magnitude = check_shape("The magnitude", tensors["magnitude"], (matrix.outputs,), matrix)
        return Directed(down, up, magnitude, self.scale_of(len(down)), self.dropout, matrix)

    def to_peft(self) -> dict[str, Any]:
        return super().to_peft() | {"use_dora": True}
