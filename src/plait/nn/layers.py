"""The parts of a block that work on each row alone: norms and feed-forwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait import ops
from plait.nn.config import FeedForwardConfig, NormConfig
from plait.nn.parameters import Parameters

__all__ = ["FeedForward", "Norm"]


class Norm(nn.Module):
    """Normalise the last axis of x (..., size)."""

    def __init__(self, config: NormConfig, size: int, parameters: Parameters) -> None:
        super().__init__()
        self.config = config
        has_weight = config.kind == "rms" or config.has_weight
        has_bias = config.kind == "layer" and config.has_bias
        self.weight = _parameter(parameters.vector(["weight"], [size])) if has_weight else None
        self.bias = _parameter(parameters.vector(["bias"], [size])) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.config.kind == "rms":
            assert self.weight is not None
            return ops.rms_norm(x, self.weight, self.config.epsilon)
        return ops.layer_norm(x, self.weight, self.bias, self.config.epsilon)


class FeedForward(nn.Module):
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate."""

    def __init__(self, config: FeedForwardConfig, width: int, parameters: Parameters) -> None:
        super().__init__()
        self.config = config
        names = ["gate", "up"] if config.gated else ["up"]
        self.up = parameters.linear(names, width, [config.size] * len(names), config.bias)
        self.down = parameters.linear(["down"], config.size, [width], config.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        if self.config.gated:
            gate, up = inner.chunk(2, dim=-1)
            return self.down(ops.activate(gate, self.config.activation) * up, entry=x)
        return self.down(ops.activate(inner, self.config.activation), entry=x)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=torch.is_grad_enabled())
