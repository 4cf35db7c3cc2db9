"""The torch form of every primitive: any device, differentiable, and the definition of the native form."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`: x (..., I), weight (O, I) -> (..., O)."""
    return F.linear(x, weight)
