"""Layers of one bit as they are trained: full weights are kept, and their signs are multiplied.

Convolutions pad with +1, the sign of 0: a padded place is one bit like any other. Where inputs are not binary they pad
with 0.

Shapes: N samples, O outputs, C inputs, S dimensions of space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import ConfigError, IncompatibleError
from plait.weights.binary.base import Binarizer, Place, Rule

__all__ = ["BinaryLayer", "Window", "begin_epoch", "binarize", "binary_layers", "finished"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
# Layers with weights that are multiplied, in forms that are not binarised here.
_OTHERS = (
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
)


class Window(NamedTuple):
    """How a convolution goes over its input; every field has a number for each dimension, none for a linear layer.

    Attributes:
        pads: places before and behind, the last dimension first, as `torch.nn.functional.pad` has them.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()

    @classmethod
    def of(cls, convolution: nn.Conv1d | nn.Conv2d) -> Window:
        """That of a convolution of torch."""
        pads: list[int] = []
        for axis in reversed(range(len(convolution.kernel_size))):
            if isinstance(convolution.padding, str):
                reach = convolution.dilation[axis] * (convolution.kernel_size[axis] - 1)
                whole = reach if convolution.padding == "same" else 0
                pads += [whole // 2, whole - whole // 2]
            else:
                pads += [convolution.padding[axis]] * 2
        return cls(convolution.kernel_size, convolution.stride, convolution.dilation, tuple(pads))

    def product(self, x: Tensor, weight: Tensor, fill: float) -> Tensor:
        """x times a weight (O, C, *kernel), where places outside of x hold `fill`."""
        if not self.kernel:
            return F.linear(x, weight)
        convolve = F.conv1d if len(self.kernel) == 1 else F.conv2d
        padded = F.pad(x, self.pads, value=fill) if any(self.pads) else x
        return convolve(padded, weight, None, self.stride, 0, self.dilation)


class BinaryLayer(nn.Module):
    """A linear layer or a convolution whose weights, and mostly inputs, are binary.

    Args:
        weight: (O, C) or (O, C, *kernel), the numbers that are trained; kept without a copy.
        bias: (O,) or None, never binary.
        binarizer: the method.
        window: of a convolution.

    Raises:
        ConfigError: a layer without inputs or outputs.
    """

    weight: nn.Parameter
    rule: Rule

    def __init__(
        self, weight: Tensor, bias: Tensor | None, binarizer: Binarizer, window: Window | None = None
    ) -> None:
        super().__init__()
        if 0 in weight.shape:
            raise ConfigError(
                f"A binary layer needs inputs and outputs. Its weight has shape {tuple(weight.shape)}."
            )
        self.binarizer, self.window = binarizer, window or Window()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        taps = math.prod(self.window.kernel)
        self.rule = binarizer.rule_at(Place(weight.shape[0], weight.shape[1], taps, len(self.window.kernel)))

    def signs(self) -> Tensor:
        """The weights as they are multiplied, (O, I)."""
        return self.rule.weights(self.weight.flatten(1))

    def scale(self) -> Tensor | None:
        """What the signs of each row stand for, (O,); None for 1."""
        return self.rule.scale(self.weight.flatten(1))

    def forward(self, a: Tensor) -> Tensor:
        """Outputs (..., O) or (N, O, *S) of inputs (..., C) or (N, C, *S)."""
        is_binary = self.binarizer.binary_inputs
        x, fill = (self.rule.inputs(a), 1.0) if is_binary else (a, 0.0)
        y = self.window.product(x, self.signs().view_as(self.weight), fill)
        scale = self.scale()
        y = y if scale is None else y * self.rule.place.along_channels(scale)
        return finished(self.rule, y, a if is_binary else None, self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.binarizer}"


def finished(rule: Rule, y: Tensor, a: Tensor | None, bias: Tensor | None) -> Tensor:
    """The output of a layer from its scaled product y: times the size of binary inputs a, through `outputs`, plus its bias."""
    size = None if a is None else rule.input_size(a)
    y = rule.outputs(y if size is None else y * size)
    return y if bias is None else y + rule.place.along_channels(bias)


def binarize(model: nn.Module, binarizer: Binarizer, skip: Sequence[str] | None = None) -> list[str]:
    """Replace the linear layers and convolutions of a model by binary ones, in place.

    They begin with the weights that are there. Train with the model's own loop, and call `begin_epoch` before each epoch.

    Args:
        skip: names of layers that stay as they are; None for the first and the last, which read data and make answers.

    Returns:
        Names of the layers that were replaced.

    Raises:
        ConfigError: a name to skip that is no layer of the model, or a layer without inputs.
        IncompatibleError: a layer of a kind that is not binarised, such as a grouped convolution; nothing was changed.
    """
    kinds = (nn.Linear, *_CONVOLUTIONS)
    modules = dict(model.named_modules())
    # Of attention that holds its projections itself, the last is a linear layer whose weight it reads past the module.
    inner = {
        child
        for module in modules.values()
        if isinstance(module, _OTHERS)
        for child in module.modules()
        if child is not module
    }
    layers = {n: m for n, m in modules.items() if isinstance(m, kinds) and m not in inner}
    others = {n: m for n, m in modules.items() if isinstance(m, _OTHERS)}
    if skip is None:
        skip = [*list(layers)[:1], *list(layers)[-1:]]
    for name in skip:
        if name not in layers and name not in others:
            raise ConfigError(f"The model has no layer {name!r} to skip. It has {', '.join(layers)}.")
    made = {name: _binary(name, m, binarizer) for name, m in layers.items() if name not in skip}
    for name, module in others.items():
        if name not in skip:
            raise _refused(name, type(module).__name__)
    for name, layer in made.items():
        if not name:
            raise ConfigError("A layer cannot be replaced in place by itself. Put it into a model.")
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer)
    return list(made)


def binary_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    """The binary layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLayer)}


def begin_epoch(model: nn.Module, epoch: int, epochs: int) -> None:
    """Tell the binary layers of a model that epoch `epoch`, from 0 on, of `epochs` begins.

    Raises:
        ConfigError: no such epoch.
    """
    if not 0 <= epoch < epochs:
        raise ConfigError(f"Epochs are counted from 0 to {epochs - 1} here. Got {epoch}.")
    for layer in binary_layers(model).values():
        layer.rule.begin_epoch(epoch, epochs)


def _binary(name: str, module: nn.Module, binarizer: Binarizer) -> BinaryLayer:
    window = None
    assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    if not isinstance(module, nn.Linear):
        if module.groups != 1:
            raise _refused(name, f"{type(module).__name__} in {module.groups} groups")
        if module.padding_mode != "zeros":
            raise _refused(name, f"{type(module).__name__} with padding_mode={module.padding_mode!r}")
        window = Window.of(module)
    bias = None if module.bias is None else module.bias.detach()
    with torch.no_grad():
        layer = BinaryLayer(module.weight.detach(), bias, binarizer, window)
    return layer.to(module.weight.device).train(module.training)


def _refused(name: str, kind: str) -> IncompatibleError:
    return IncompatibleError(
        f"{name} is a {kind}, which has no binary form. Linear, Conv1d and Conv2d in one group have; name it in skip."
    )
