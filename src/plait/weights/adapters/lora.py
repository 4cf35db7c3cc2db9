"""LoRA: a product of two thin matrices beside each frozen one.

Source: Hu et al. 2021, arXiv:2106.09685; the scale of rsLoRA is Kalajdzievski 2023, arXiv:2312.03732, the
learning rates of LoRA+ Hayou et al. 2024, arXiv:2402.12354, a frozen A is LoRA-FA, arXiv:2308.03303, and the start from what
packing lost is LoftQ, Li et al. 2023, arXiv:2310.08659.

Shapes: O outputs, I inputs, R rank. `y = W x + scale * B (A x)` with A (R, I) and B (O, R).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from plait.errors import ConfigError
from plait.weights.adapters.base import (
    AdapterConfig,
    Change,
    Delta,
    Matrix,
    check_rank,
    check_shape,
    number,
    peft_settings,
    uniform_,
)
from plait.weights.loftq import nearest_product

__all__ = ["LoRA", "LowRank", "checked_pair"]

Rank = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LowRank(Change):
    """One pair of thin matrices.

    Args:
        down: A, (R, I).
        up: B, (O, R).
        scale: of their product.
        dropout: of the inputs in training.
    """

    peft_names: ClassVar[dict[str, str]] = {"down": "lora_A.weight", "up": "lora_B.weight"}
    per_output: ClassVar[frozenset[str]] = frozenset({"up"})

    def __init__(self, down: Tensor, up: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale, self.dropout = scale, dropout

    def delta(self) -> Delta:
        return Delta(down=self.down, up=self.up * self.scale)


def checked_pair(matrix: Matrix, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) as they were stored.

    Raises:
        ConfigError: shapes that do not fit each other or the matrix.
    """
    rank = tensors["down"].shape[0] if tensors["down"].dim() else 0
    check_rank(rank, matrix)
    return (
        check_shape("A", tensors["down"], (rank, matrix.inputs), matrix),
        check_shape("B", tensors["up"], (matrix.outputs, rank), matrix),
    )


@torch.no_grad()
def _lost(matrix: Matrix) -> Tensor:
    """What packing took from a matrix, (O, I).

    Raises:
        ConfigError: the original is not known, or is another matrix.
    """
    if matrix.original is None:
        raise ConfigError(
            "LoRA.start=loftq starts from what packing lost, which needs the model as it was before. Give it with "
            "plait train adapter --original MODEL, or new_adapter(..., original=model)."
        )
    original = matrix.original(slice(None))
    lost = original - matrix.rows(slice(None))
    if float(lost.norm()) > float(original.norm()):
        raise ConfigError(
            f"{matrix.name} differs from the original by more than its own size, so it was not packed from that, or its "
            "columns were scaled first, as awq and bitstack do. Choose start=zero."
        )
    return lost


@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterConfig, name="lora"):
    """Two thin matrices beside each frozen one: the default choice, with nothing lost when merged.

    Costs rank * (inputs + outputs) numbers for each matrix, and as many multiplications a token. Starts as the
    model it is put on, since B is 0; or nearer to the model that this one was packed from.

    Args:
        rank: R, at most the smaller side of every target.
        alpha: the product is scaled by alpha / rank.
        scaling: `rank` for that, or `root` for alpha / sqrt(rank), which suits ranks above 32 (rsLoRA).
        dropout: share of inputs that the adapter does not see in a training step.
        up_rate: how much faster B learns than A; 16 is LoRA+.
        start: `zero`, or `loftq` for the product that comes nearest to what packing took from the matrix, which needs the
            original model.
        trains: `both`, or `up` to keep A as it was drawn (LoRA-FA): half the numbers to train.
    """

    rank: Rank = 8
    alpha: Positive = 16.0
    scaling: Literal["rank", "root"] = "rank"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    up_rate: Positive = 1.0
    start: Literal["zero", "loftq"] = "zero"
    trains: Literal["both", "up"] = "both"

    peft_type: ClassVar[str] = "LORA"
    changes: ClassVar[type[Change]] = LowRank

    @property
    def needs_original(self) -> bool:
        return self.start == "loftq"

    def scale_of(self, rank: int) -> float:
        """The factor on the product of matrices of this rank."""
        return self.alpha / (rank**0.5 if self.scaling == "root" else rank)

    def change(self, matrix: Matrix, generator: torch.Generator, shared: Mapping[str, Tensor]) -> LowRank:
        check_rank(self.rank, matrix)
        scale = self.scale_of(self.rank)
        if self.start == "loftq":
            down, up = nearest_product(_lost(matrix), self.rank)
            up = up / scale
        else:
            down = uniform_(torch.empty(self.rank, matrix.inputs), matrix.inputs, generator)
            up = torch.zeros(matrix.outputs, self.rank)
        made = LowRank(down, up, scale, self.dropout)
        made.down.requires_grad_(self.trains == "both")
        return made

    def restored(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> LowRank:
        down, up = checked_pair(matrix, tensors)
        return LowRank(down, up, self.scale_of(len(down)), self.dropout)

    def learning_rate_factor(self, parameter: str) -> float:
        return self.up_rate if parameter == "up" else 1.0

    def to_peft(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.scaling == "root",
            "use_dora": False,
            "init_lora_weights": True,
            "fan_in_fan_out": False,
            "rank_pattern": {},
            "alpha_pattern": {},
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        peft_settings(
            config,
            ignored={
                "alpha_pattern": {}, "modules_to_save": None, "bias": "none", "lora_bias": False,
                "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
                "alora_invocation_tokens": None, "use_qalora": False, "use_bdlora": None,
            },
        )  # fmt: skip
        rank = number(config, "r", 8)
        if not isinstance(rank, int):
            raise ConfigError(f"adapter_config.json sets r to {rank!r}. It must be a whole number.")
        return cls(
            rank=rank,
            alpha=float(number(config, "lora_alpha", 8)),
            scaling="root" if config.get("use_rslora") else "rank",
            dropout=float(number(config, "lora_dropout", 0.0)),
        )
