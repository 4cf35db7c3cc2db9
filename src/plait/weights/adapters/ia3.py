"""(IA)3: keys, values and the inside of feed-forwards are multiplied by learned vectors.

Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from plait.weights.adapters.base import AdapterConfig, Change, Delta, Matrix, check_shape, peft_settings

__all__ = ["IA3"]


class Factors(Change):
    """A factor for each output of a product, or for each of its inputs.

    Args:
        factors: (O,) or (I,).
        of_inputs: which of the two.
    """

    peft_names: ClassVar[dict[str, str]] = {"factors": "ia3_l"}

    def __init__(self, factors: Tensor, of_inputs: bool) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors)
        self.of_inputs = of_inputs

    def delta(self) -> Delta:
        return Delta(input_scale=self.factors) if self.of_inputs else Delta(output_scale=self.factors)

    def stored(self, name: str) -> Tensor:
        return self.factors[None, :] if self.of_inputs else self.factors[:, None]

    @classmethod
    def rows_of(cls, name: str, tensor: Tensor, rows: slice) -> Tensor:
        return tensor[rows] if tensor.dim() == 2 and tensor.shape[1] == 1 else tensor


@dataclass(frozen=True, kw_only=True)
class IA3(AdapterConfig, name="ia3"):
    """Vectors that scale keys, values and the inside of feed-forwards: a hundredth of what LoRA trains.

    Adds next to no work, and merges exactly. It learns less than LoRA where a task is far from what the model can
    do already.

    Args:
        targets: whose products are scaled; of `down` it is the inputs.
    """

    targets: str = "key+value+down"

    peft_type: ClassVar[str] = "IA3"
    changes: ClassVar[type[Change]] = Factors

    def change(self, matrix: Matrix, generator: torch.Generator, shared: Mapping[str, Tensor]) -> Factors:
        of_inputs = matrix.place == "down"
        return Factors(torch.ones(matrix.inputs if of_inputs else matrix.outputs), of_inputs)

    def restored(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Factors:
        # Files say by the shape which of the two it is.
        of_inputs = tensors["factors"].dim() == 2 and tensors["factors"].shape[0] == 1
        wanted = (1, matrix.inputs) if of_inputs else (matrix.outputs, 1)
        return Factors(check_shape("l", tensors["factors"], wanted, matrix).flatten(), of_inputs)

    def to_peft(self) -> dict[str, Any]:
        return {"fan_in_fan_out": False, "init_ia3_weights": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        peft_settings(config, ignored={"modules_to_save": None})
        return cls()
