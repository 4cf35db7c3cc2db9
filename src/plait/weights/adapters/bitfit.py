"""BitFit: only biases are trained.

Source: Ben Zaken, Ravfogel, Goldberg 2021, arXiv:2106.10199.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.weights.adapters.base import AdapterConfig, Change, Delta, Matrix, check_shape

__all__ = ["BitFit"]


class Bias(Change):
    """A number that is added to each output, (O,)."""

    peft_names: ClassVar[dict[str, str]] = {"added": "bias_added"}
    per_output: ClassVar[frozenset[str]] = frozenset({"added"})

    def __init__(self, added: Tensor) -> None:
        super().__init__()
        self.added = nn.Parameter(added)

    def delta(self) -> Delta:
        return Delta(bias=self.added)


@dataclass(frozen=True, kw_only=True)
class BitFit(AdapterConfig, name="bitfit"):
    """A trained bias on every product, added to the model's own where it has one.

    Most models today have no biases; they get new ones, which start at zero. Costs one addition an output.
    The `peft` package has no such kind, so that only Plait reads the files.
    """

    changes: ClassVar[type[Change]] = Bias

    def change(self, matrix: Matrix, generator: torch.Generator, shared: Mapping[str, Tensor]) -> Bias:
        return Bias(torch.zeros(matrix.outputs))

    def restored(self, matrix: Matrix, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Bias:
        return Bias(check_shape("The bias", tensors["added"], (matrix.outputs,), matrix))
