"""The networks of the benchmark, each of one family and the same for every method.

Layers named `stem` and `head` read the data and make the answer, and stay as they are. Where others have ReLU these have
PReLU, and norms stand behind what takes the largest of several: a layer that sees hardly a negative input gets the same
bits for every sample.

Shapes: N samples, C channels, T tokens or points, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.claims.bibench.data import Task
from plait.weights.binary import Binarizer, binarize

__all__ = ["NETWORKS", "Network", "binarized"]


class Network(NamedTuple):
    """How a network is made.

    Attributes:
        family: `cnn`, `transformer` or `mlp`.
        task: what it learns.
        build: makes it for a task, of a width.
    """

    family: str
    task: str
    build: Callable[[Task, int], nn.Module]


class ResidualBlock(nn.Module):
    """Two 3 by 3 convolutions around which the input goes; (N, C, H, W)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.bends = nn.ModuleList(nn.PReLU(outputs) for _ in range(2))
        self.shortcut = nn.Identity() if stride == 1 else _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bends[0](self.norms[0](self.first(x)))
        found: Tensor = self.bends[1](self.norms[1](self.second(y)) + self.shortcut(x))
        return found


class ResNet(nn.Module):
    """A small residual network for images (N, 1, H, W)."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm, self.bend = nn.BatchNorm2d(width), nn.PReLU(width)
        self.blocks = nn.Sequential(ResidualBlock(width, width, 1), ResidualBlock(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bend(self.norm(self.stem(x))))
        found: Tensor = self.head(x.mean(dim=(2, 3)))
        return found


class TextConvolutions(nn.Module):
    """Convolutions over ids (N, T), half as many places after each."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.stem = nn.Embedding(task.symbols, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(3))
        self.bends = nn.ModuleList(nn.PReLU(width) for _ in range(3))
        self.head = nn.Linear(width, task.classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.stem(ids).transpose(1, 2)
        for layer, norm, bend in zip(self.layers, self.norms, self.bends, strict=True):
            x = bend(norm(F.max_pool1d(layer(x), 2)))
        found: Tensor = self.head(x.mean(dim=2))
        return found


class EncoderBlock(nn.Module):
    """Attention of every token to all, and a feed-forward, each behind a norm; (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        parts = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.output(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return found


class Encoder(nn.Module):
    """An encoder of ids (N, T), or of images whose rows are its tokens (N, 1, T, C)."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        shape = task.learned.inputs.shape
        self.stem = nn.Embedding(task.symbols, width) if task.symbols else nn.Linear(shape[-1], width)
        self.positions = nn.Parameter(0.02 * torch.randn(shape[1] if task.symbols else shape[-2], width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads=4) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x if x.dim() == 2 else x[:, 0]) + self.positions
        x = self.norm(self.blocks(x))
        found: Tensor = self.head(x.mean(dim=1) + x[:, -1])
        return found


class PointNet(nn.Module):
    """Points (N, T, 3) each by itself, the largest of every channel, and layers above that."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(task.learned.inputs.shape[2], width)
        self.points = nn.ModuleList([_Layer(width, 2 * width), _Layer(2 * width, 4 * width)])
        self.norm = nn.BatchNorm1d(4 * width)
        self.whole = nn.ModuleList([_Layer(4 * width, 2 * width), _Layer(2 * width, width)])
        self.head = nn.Linear(width, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        count = len(x)
        x = self.stem(x.flatten(0, 1))
        for layer in self.points:
            x = layer(x)
        x = self.norm(x.unflatten(0, (count, -1)).amax(dim=1))
        for layer in self.whole:
            x = layer(x)
        found: Tensor = self.head(x)
        return found


class Perceptron(nn.Module):
    """Ids (N, T) side by side, and layers above them."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.stem = nn.Embedding(task.symbols, width)
        inputs = task.learned.inputs.shape[1] * width
        self.layers = nn.Sequential(_Layer(inputs, 4 * width), _Layer(4 * width, 4 * width))
        self.head = nn.Linear(4 * width, task.classes)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(self.stem(ids).flatten(1)))
        return found


NETWORKS = {
    "digits-cnn": Network("cnn", "digits", ResNet),
    "digits-transformer": Network("transformer", "digits", Encoder),
    "points-mlp": Network("mlp", "points", PointNet),
    "lines-cnn": Network("cnn", "lines", TextConvolutions),
    "lines-transformer": Network("transformer", "lines", Encoder),
    "events-mlp": Network("mlp", "events", Perceptron),
    "events-transformer": Network("transformer", "events", Encoder),
}


def binarized(network: Network, task: Task, width: int, method: Binarizer | None) -> nn.Module:
    """A new network whose inner layers are binary, or as they are for None."""
    model = network.build(task, width)
    if method is not None:
        plain = [name for name in ("stem", "head") if not isinstance(getattr(model, name), nn.Embedding)]
        binarize(model, method, skip=plain)
    return model


class _Layer(nn.Module):
    """A linear layer, a norm and a bend; (N, C)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)
        self.bend = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.bend(self.norm(self.linear(x)))
        return found


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
