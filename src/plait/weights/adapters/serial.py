"""Serial adapters: a bottleneck behind attention and behind the feed-forward of every block.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, section 2.1.

Shapes: W the model's width, R the numbers inside. `y + U f(D y + b) + c` with D (R, W) and U (W, R).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from plait.errors import ConfigError
from plait.weights.adapters.base import (
    AdapterConfig,
    Bottleneck,
    Change,
    Delta,
    Matrix,
    check_shape,
    uniform_,
)

__all__ = ["Neck", "Serial"]

# The products that end a branch, whose outputs are added to the row that the branch read.
_ENDS = frozenset({"output", "down"})


class Neck(Change):
    """The bottleneck at the end of one branch.

    Args:
        down: D, (R, W).
        down_bias: b, (R,).
        up: U, (W, R).
        up_bias: c, (W,).
        activation: f.
        scale: of what is added.
        reads_output: whether y is read, or what the branch read.
    """

    peft_names: ClassVar[dict[str, str]] = {
        "down": "adapter_down.weight",
        "down_bias": "adapter_down.bias",
        "up": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
    }
    per_output: ClassVar[frozenset[str]] = frozenset({"up", "up_bias"})

    def __init__(
        self,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        activation: str,
        scale: float,
        reads_output: bool,
    ) -> None:
        super().__init__()
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(down_bias)
        self.up, self.up_bias = nn.Parameter(up), nn.Parameter(up_bias)
        self.activation, self.scale, self.reads_output = activation, scale, reads_output

    def delta(self) -> Delta:
        return Delta(
            bottleneck=Bottleneck(
                self.down,
                self.down_bias,
                self.up * self.scale,
                self.up_bias * self.scale,
                self.activation,
                self.reads_output,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Serial(AdapterConfig, name="serial"):
    """A bottleneck behind attention and behind the feed-forward, which reads what they come to.

    Costs 2 R W + R + W numbers for each target, and 2 R W multiplications a token. Starts as the model it is put on, since
    U and c are 0. It cannot be merged, because of the activation, so that it always costs that time. The `peft` package
    has no such kind, so that only Plait reads the files. Layers whose outputs are normalised get it in front of that norm.

    Args:
        size: R, numbers inside, at most the model's width.
        activation: f, one of `relu`, `gelu`, `gelu_tanh` and `silu`.
    """

    targets: str = "output+down"
    size: Annotated[int, Field(ge=1)] = 64
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"

    changes: ClassVar[type[Change]] = Neck
    reads_output: ClassVar[bool] = True

    def check(self) -> None:
        wrong = sorted(self.places() - _ENDS)
        if wrong:
            raise ConfigError(
                f"{type(self).__name__}.targets must be output, down or output+down, where a branch ends. "
                f"Got {', '.join(wrong)}."
            )

    def change(self, matrix: Matrix, generator: torch.Generator, shared: Mapping[str, Tensor]) -> Neck:
        width = matrix.outputs
        if self.size > width:
            raise ConfigError(
                f"{type(self).__name__}.size must be at most the model's width, {width}. Got {self.size}."
            )
        down = uniform_(torch.empty(self.size, width), width, generator)
        return self._neck(down, torch.zeros(self.size), torch.zeros(width, self.size), torch.zeros(width))

    def restored(self, matrix: Matrix, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Neck:
        width = matrix.outputs
        return self._neck(
            check_shape("The matrix down", tensors["down"], (self.size, width), matrix),
            check_shape("The bias inside", tensors["down_bias"], (self.size,), matrix),
            check_shape("The matrix up", tensors["up"], (width, self.size), matrix),
            check_shape("The bias", tensors["up_bias"], (width,), matrix),
        )

    def factor(self) -> float:
        """Of what is added."""
        return 1.0

    def _neck(self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Neck:
        return Neck(down, down_bias, up, up_bias, self.activation, self.factor(), self.reads_output)
