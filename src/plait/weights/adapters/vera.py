"""VeRA: random matrices that all layers share, and two trained vectors at each.

Source: Kopiczko et al. 2023, arXiv:2310.11454, equation 2: `y = W x + b * (B (d * (A x)))`, with A (R, I) and
B (O, R) frozen, cut from one pair that is as large as the largest matrix.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from plait.errors import ConfigError
from plait.weights.adapters.base import (
    AdapterConfig,
    Change,
    Delta,
    Matrix,
    check_shape,
    number,
    peft_settings,
)

__all__ = ["VeRA"]


class Vectors(Change):
    """Two vectors around a random product.

    Args:
        inner: d, (R,).
        outer: b, (O,).
        down, up: A (R, I) and B (O, R), shared with other matrices and never trained.
    """

    peft_names: ClassVar[dict[str, str]] = {"inner": "vera_lambda_d", "outer": "vera_lambda_b"}
    per_output: ClassVar[frozenset[str]] = frozenset({"outer"})

    def __init__(self, inner: Tensor, outer: Tensor, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(inner), nn.Parameter(outer)
        # Views of what all layers share; as buffers they would be written once for each.
        self._random = (down, up)

    def delta(self) -> Delta:
        down, up = self._random
        return Delta(down=down * self.inner[:, None], up=up * self.outer[:, None])


@dataclass(frozen=True, kw_only=True)
class VeRA(AdapterConfig, name="vera"):
    """Two vectors a matrix: few numbers to train, beside random matrices that are never trained.

    Work a token is that of LoRA of the same rank, and the rank is large, so that the cheapest to store is not
    the cheapest to run.

    Args:
        rank: R of the random matrices.
        start: first value of the inner vectors.
        seed: of the random matrices.
    """

    rank: Annotated[int, Field(ge=1, le=65536)] = 256
    start: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    seed: Annotated[int, Field(ge=0)] = 0

    peft_type: ClassVar[str] = "VERA"
    changes: ClassVar[type[Change]] = Vectors
    peft_shared: ClassVar[dict[str, str]] = {"down": "vera_A", "up": "vera_B"}

    def shared(self, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        inputs = max(matrix.inputs for matrix in matrices)
        outputs = max(matrix.outputs for matrix in matrices)
        made = {}
        for name, shape, fan_in in (
            ("down", (self.rank, inputs), inputs),
            ("up", (outputs, self.rank), self.rank),
        ):
            bound = (6.0 / fan_in) ** 0.5
            made[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return made

    def change(self, matrix: Matrix, generator: torch.Generator, shared: Mapping[str, Tensor]) -> Vectors:
        new = {"inner": torch.full((self.rank,), self.start), "outer": torch.zeros(matrix.outputs)}
        return self.restored(matrix, new, shared)

    def restored(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Vectors:
        down, up = shared["down"], shared["up"]
        if down.dim() != 2 or up.dim() != 2 or down.shape[1] < matrix.inputs or up.shape[0] < matrix.outputs:
            raise ConfigError(
                f"VeRA's random matrices are {tuple(down.shape)} and {tuple(up.shape)}, too small for "
                f"{matrix.name} of {matrix.outputs} x {matrix.inputs}. The adapter belongs to another model."
            )
        return Vectors(
            check_shape("d", tensors["inner"], (self.rank,), matrix),
            check_shape("b", tensors["outer"], (matrix.outputs,), matrix),
            down[:, : matrix.inputs],
            up[: matrix.outputs],
        )

    def to_peft(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "projection_prng_key": self.seed,
            "save_projection": True,
            "vera_dropout": 0.0,
            "d_initial": self.start,
            "fan_in_fan_out": False,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        peft_settings(config, ignored={"modules_to_save": None, "bias": "none"})
        if not config.get("save_projection", True):
            raise ConfigError(
                "The adapter was saved without VeRA's random matrices, which another library may draw otherwise. "
                "Save it with save_projection=True."
            )
        return cls(
            rank=number(config, "r", 256),
            start=float(number(config, "d_initial", 0.1)),
            seed=number(config, "projection_prng_key", 0),
        )
