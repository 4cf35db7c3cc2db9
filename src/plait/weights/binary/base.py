"""What a binarisation method says of a layer: what its weights and inputs are where each has one bit.

Shapes: O outputs, C inputs (channels of a convolution), K taps of its window (1 for a linear layer), I = C K columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from plait.spec import Axis, Spec

__all__ = ["BINARIZERS", "Binarizer", "Place", "Rule"]

BINARIZERS = Axis("binarisation method")


class Place(NamedTuple):
    """The layer that a method is used in.

    Attributes:
        outputs, inputs, taps: O, C and K.
        dims: 0 for a linear layer, else the dimensions of its window, 1 or 2.
    """

    outputs: int
    inputs: int
    taps: int
    dims: int

    @property
    def columns(self) -> int:
        """Weights of an output, I."""
        return self.inputs * self.taps

    @property
    def channel_axis(self) -> int:
        """The axis of inputs and outputs that holds channels, counted from the last."""
        return -1 - self.dims

    @property
    def sample_axes(self) -> tuple[int, ...]:
        """The axes of one input: the last of a token, all but the first of an image."""
        return tuple(range(-1 - self.dims, 0))

    def along_channels(self, numbers: Tensor) -> Tensor:
        """Numbers (channels,) in a shape that meets inputs and outputs on their channel axis."""
        return numbers.view(-1, *[1] * self.dims)


class Rule(nn.Module):
    """A method at work in one layer, with what it learns there.

    The layer's output is the product of `inputs` and `weights`, times `scale`, times `input_size`, through `outputs`, plus
    its bias. So what is summed are whole numbers, in training as in packed form, and both round at the same places.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def weights(self, w: Tensor) -> Tensor:
        """Weights (O, I) as they are multiplied, with gradients: 1 or -1."""
        raise NotImplementedError

    def scale(self, w: Tensor) -> Tensor | None:
        """What the signs of each row of w (O, I) stand for, (O,), no gradient; None for 1."""
        return None

    def inputs(self, a: Tensor) -> Tensor:
        """Inputs as they are multiplied, with gradients: the signs of a + `shift`."""
        raise NotImplementedError

    def shift(self) -> Tensor | None:
        """What is added to each input channel before its sign is taken, (C,); None for nothing."""
        return None

    def input_size(self, a: Tensor) -> Tensor | None:
        """What the signs of each input stand for, to be multiplied with the output; None for 1."""
        return None

    def outputs(self, y: Tensor) -> Tensor:
        """Outputs with what is learned of their scale."""
        return y

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Take the settings of epoch `epoch`, from 0 on, of `epochs`."""

    def finish(self) -> None:
        """Drop what training alone needs.

        Raises:
            IncompatibleError: the layer still needs it.
        """


@dataclass(frozen=True, kw_only=True)
class Binarizer(Spec, axis=BINARIZERS):
    """A way to train layers whose weights, and mostly inputs, have one bit; a value object.

    To add one: one file in `plait/weights/binary/` with a dataclass that derives from this class and the `Rule` it
    makes, and one import in `plait/weights/binary/__init__.py`.

    Args:
        binary_inputs: whether inputs have one bit too; without, they are multiplied as they are.
    """

    rule: ClassVar[type[Rule]] = Rule
    binary_inputs: bool = True

    def rule_at(self, place: Place) -> Rule:
        """The method at work in a layer."""
        return self.rule(place)
