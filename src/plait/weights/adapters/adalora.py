"""AdaLoRA: low-rank changes whose ranks are shared out among the matrices while they are trained.

Source: Zhang et al. 2023, arXiv:2303.10512: Delta = P diag(lambda) Q (equation 3), the regulariser of equation 4,
the importance of a triplet in equations 8 to 10, and the cubic budget of equation 12.

Shapes: O outputs, I inputs, R rank; Q is (R, I), lambda (R, 1), P (O, R).
"""

from __future__ import annotations

from collections.abc import Mapping
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
    check_rank,
    check_shape,
    number,
    peft_settings,
)
from plait.weights.adapters.lora import checked_pair

__all__ = ["AdaLoRA"]

_SMOOTHING = 0.85


class Triplets(Change):
    """Singular triplets.

    Args:
        down: Q, (R, I).
        values: lambda, (R, 1).
        up: P, (O, R).
        alpha: the change is scaled by alpha / R.
    """

    peft_names: ClassVar[dict[str, str]] = {"down": "lora_A", "values": "lora_E", "up": "lora_B"}
    per_output: ClassVar[frozenset[str]] = frozenset({"up"})

    def __init__(self, down: Tensor, values: Tensor, up: Tensor, alpha: float) -> None:
        super().__init__()
        self.down, self.values, self.up = nn.Parameter(down), nn.Parameter(values), nn.Parameter(up)
        self.alpha = alpha
        # Smoothed sensitivity |w g| of every number, and how much it varies.
        for name in ("down", "values", "up"):
            for kind in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(getattr(self, name)))

    def delta(self) -> Delta:
        # The small constant is that of the `peft` package, whose files this is to read the same.
        return Delta(down=self.down * self.values, up=self.up * (self.alpha / (len(self.down) + 1e-5)))

    @torch.no_grad()
    def watch(self) -> None:
        """Take in the gradients of a step (equations 9 and 10)."""
        for name in ("down", "values", "up"):
            parameter = getattr(self, name)
            now = (parameter * parameter.grad).abs()
            sensitivity, uncertainty = (
                getattr(self, f"sensitivity_{name}"),
                getattr(self, f"uncertainty_{name}"),
            )
            sensitivity.lerp_(now, 1 - _SMOOTHING)
            uncertainty.lerp_((now - sensitivity).abs(), 1 - _SMOOTHING)

    def importance(self) -> Tensor:
        """Of each triplet, (R,) (equation 8)."""
        down, values, up = (
            getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}")
            for name in ("down", "values", "up")
        )
        return values[:, 0] + down.mean(dim=1) + up.mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(AdapterConfig, name="adalora"):
    """LoRA whose ranks go where they matter: training starts with more and drops the least important.

    Costs one and a half times LoRA's numbers while it trains. Matrices that turn out not to matter end with rank 0.

    Args:
        rank: mean rank at the end.
        first_rank: rank of every matrix at the start.
        alpha: the change is scaled by alpha / first_rank.
        warmup, final: shares of the run before ranks begin to fall, and after they are settled.
        every: steps between changes of the ranks.
        orthogonality: weight of the regulariser.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    first_rank: Annotated[int, Field(ge=1)] = 12
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    final: Annotated[float, Field(ge=0, lt=1)] = 0.3
    every: Annotated[int, Field(ge=1)] = 5
    orthogonality: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5

    peft_type: ClassVar[str] = "ADALORA"
    changes: ClassVar[type[Change]] = Triplets

    def check(self) -> None:
        super().check()
        if self.rank > self.first_rank or self.warmup + self.final >= 1:
            raise ConfigError(
                f"AdaLoRA.rank must be at most first_rank, and warmup and final must leave steps between them. "
                f"Got rank {self.rank} of {self.first_rank}, warmup {self.warmup} and final {self.final}."
            )

    def change(self, matrix: Matrix, generator: torch.Generator, shared: Mapping[str, Tensor]) -> Triplets:
        check_rank(self.first_rank, matrix)
        rank = self.first_rank
        down = torch.empty(rank, matrix.inputs).normal_(0, 0.02, generator=generator)
        up = torch.empty(matrix.outputs, rank).normal_(0, 0.02, generator=generator)
        return Triplets(down, torch.zeros(rank, 1), up, self.alpha)

    def restored(
        self, matrix: Matrix, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> Triplets:
        down, up = checked_pair(matrix, tensors)
        values = check_shape("lambda", tensors["values"], (len(down), 1), matrix)
        return Triplets(down, values, up, self.alpha)

    def regularisation(self, changes: Mapping[str, Change]) -> Tensor | None:
        terms = []
        for change in changes.values():
            assert isinstance(change, Triplets)
            grams = (change.up.t() @ change.up, change.down @ change.down.t())
            terms += [(gram - torch.eye(len(gram))).norm() for gram in grams]
        return self.orthogonality * torch.stack(terms).mean() if terms and self.orthogonality else None

    def after_backward(self, changes: Mapping[str, Change]) -> None:
        for change in changes.values():
            assert isinstance(change, Triplets)
            change.watch()

    @torch.no_grad()
    def after_step(self, changes: Mapping[str, Change], step: int, steps: int) -> None:
        start, end = round(self.warmup * steps), steps - round(self.final * steps)
        if step <= start or (step < end and step % self.every):
            return
        left = 0.0 if step >= end else 1 - (step - start) / (end - start)
        kept = (self.rank + (self.first_rank - self.rank) * left**3) * len(changes)
        triplets = [change for change in changes.values() if isinstance(change, Triplets)]
        scores = torch.cat([change.importance() for change in triplets])
        dropped = len(scores) - int(kept)
        if dropped <= 0:
            return
        limit = scores.kthvalue(dropped).values
        for change in triplets:
            change.values.masked_fill_((change.importance() <= limit)[:, None], 0.0)

    def to_peft(self) -> dict[str, Any]:
        return {
            "r": self.first_rank,
            "target_r": self.rank,
            "init_r": self.first_rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "orth_reg_weight": self.orthogonality,
            "total_step": 1_000_000,
            "beta1": _SMOOTHING,
            "beta2": _SMOOTHING,
            "deltaT": self.every,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        peft_settings(config, ignored={"modules_to_save": None, "bias": "none", "rank_pattern": {}})
        first = int(number(config, "init_r", 12))
        return cls(
            first_rank=first,
            rank=min(first, int(number(config, "target_r", 8))),
            alpha=float(number(config, "lora_alpha", 8)),
        )
