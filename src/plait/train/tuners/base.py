"""What every way of tuning packed matrices offers, and the step of dense weights that those share which choose codes.

Shapes: O output rows, I input columns, N code groups of a matrix, W columns of one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from plait.errors import ConfigError
from plait.spec import Axis, Spec
from plait.weights import Tunable

__all__ = ["TUNERS", "Tuner", "by_group", "latent_of", "relative_step"]

TUNERS = Axis("way of tuning")
_EPSILON = 1e-12


class Tuner(Spec, axis=TUNERS):
    """What is done to codes, beside the training of numbers that every way of tuning has; a value object.

    To add one: one file in `plait/train/tuners/` with a frozen dataclass that derives from this class, and one
    import in that folder's `__init__.py`. Whatever it remembers from step to step are buffers of the matrices, so that
    a checkpoint has them.
    """

    def prepare(self, matrix: Tunable, original: Tensor | None) -> None:
        """Give a matrix the buffers that `after_step` needs.

        Args:
            original: the matrix that it was packed from, (O, I); None where the run has none.
        """

    def after_step(self, matrices: Mapping[str, Tunable], step: int, share: float = 1.0) -> int:
        """Choose codes anew, behind a step of the numbers that used the same gradient.

        Args:
            matrices: by name; those with a `gradient` were used in the pass.
            step: from 1 on.
            share: of the highest learning rate that the schedule has in this step.

        Returns:
            How many code groups changed.
        """
        return 0


def by_group(dense: Tensor, matrix: Tunable) -> Tensor:
    """A dense matrix (O, I) by code groups, (N, W)."""
    return dense.reshape(-1, matrix.width)


def relative_step(matrix: Tunable, size: float, decay: float, step: int) -> Tensor:
    """A step against the gradient, (O, I), whose norm is `size` times that of the matrix.

    Its direction is that of Adam without momentum: the gradient over the root of the mean of its squares, which are kept
    in the buffer `squares` with this decay; the size is LAMB's.
    """
    gradient, squares = matrix.gradient, matrix.get_buffer("squares")
    assert gradient is not None
    squares.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
    direction = gradient / ((squares / (1 - decay**step)).sqrt_() + _EPSILON)
    norm = direction.norm()
    weight_norm = matrix.dense().norm()
    return direction * (size * weight_norm / norm.clamp(min=_EPSILON))


def latent_of(matrix: Tunable, original: Tensor | None, source: str) -> Tensor:
    """Dense weights that codes are chosen from: those of the packed matrix, or those of the model it was made of.

    Raises:
        ConfigError: the run has no such model, or its matrix has another shape.
    """
    if source == "packed":
        return matrix.dense().detach().clone()
    if original is None or tuple(original.shape) != matrix.shape:
        raise ConfigError("latent=model needs the model that was packed. Name it with --teacher.")
    return original.detach().float().clone()
