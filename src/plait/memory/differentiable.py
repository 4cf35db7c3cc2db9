"""A tail through which gradients flow, for models that are trained with the memory that they will be used with.

Shapes: G key/value heads, T tokens of the strand, n new ones, D head size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.memory.strand import DenseStrand

__all__ = ["DifferentiableStrand"]


class DifferentiableStrand(DenseStrand):
    """A dense strand that keeps the graph of what is written to it, and is never written to in place.

    Appending copies all that is held, so tokens are best written at once.
    """

    @property
    def layout(self) -> None:
        """No native operation reads it: they have no gradient."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        dtype = self._keys.dtype
        self._keys = torch.cat([self.keys, keys.transpose(0, 1).to(dtype)], dim=1)
        self._values = torch.cat([self.values, values.transpose(0, 1).to(dtype)], dim=1)
        self.length += keys.shape[0]

    def keep(self, rows: Tensor, first: int) -> None:
        kept = torch.cat([torch.arange(first, device=rows.device), first + rows])
        self._keys, self._values, self.length = self._keys[:, kept], self._values[:, kept], kept.numel()
