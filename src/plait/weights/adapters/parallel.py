"""Parallel adapters: a bottleneck beside the feed-forward of every block, which reads what that reads.

Source: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366,
sections 3.3 and 4.

Shapes: W the model's width, R the numbers inside. `y + s (U f(D x + b) + c)` with x what the branch read, normalised
as the branch has it, D (R, W) and U (W, R).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from plait.weights.adapters.serial import Serial

__all__ = ["Parallel"]


@dataclass(frozen=True, kw_only=True)
class Parallel(Serial, name="parallel"):
    """A bottleneck beside the feed-forward: more for the same numbers than one behind it, as the paper finds.

    Costs and limits are those of `serial`. With `targets=output` it stands beside attention, with `output+down` beside
    both; `parallel:size=512` and a `prefix` together are the paper's MAM adapter, which needs two adapters on one request
    and is not offered.

    Args:
        scale: s, of what is added.
    """

    targets: str = "down"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0

    reads_output: ClassVar[bool] = False

    def factor(self) -> float:
        return self.scale
