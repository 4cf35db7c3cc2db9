"""What calibration text tells about the inputs of a matrix.

Shapes: N rows of activations, I input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from plait.errors import ConfigError

__all__ = ["NEEDS", "Stats"]

T = TypeVar("T")

# What a weight format may ask for.
NEEDS = ("norms", "hessian", "block_io")


class Stats:
    """Sums over the inputs of one matrix, or of several that read the same inputs; made in one pass.

    Args:
        columns: inputs I.
        needs: which sums to keep: `norms` for `norm2` and `mean_abs`, `hessian` for `hessian` as well.

    Attributes:
        tokens: rows that were added.
    """

    def __init__(self, columns: int, needs: Collection[str] = ("norms", "hessian")) -> None:
        self.columns = columns
        self.tokens = 0
        self._squares = torch.zeros(columns, dtype=torch.float64)
        self._sizes = torch.zeros(columns, dtype=torch.float64)
        self._products = torch.zeros(columns, columns, dtype=torch.float64) if "hessian" in needs else None
        self._derived: dict[Hashable, object] = {}

    def add(self, x: Tensor) -> None:
        """Count rows of activations, (..., I).

        Products are formed in fp32 for the rows of one call and summed in fp64, so few thousand rows at
        a time keep about seven digits.

        Raises:
            ConfigError: an activation is NaN or infinite; nothing was added.
        """
        rows = x.detach().reshape(-1, self.columns).float()
        if not torch.isfinite(rows).all():
            raise ConfigError("an activation is NaN or infinite")
        self._derived.clear()
        self.tokens += rows.shape[0]
        self._squares += rows.double().square().sum(dim=0)
        self._sizes += rows.double().abs().sum(dim=0)
        if self._products is not None:
            self._products += (rows.T @ rows).double()

    @property
    def norm2(self) -> Tensor:
        """Mean square of each input, (I,) fp64."""
        return self._squares / self._count()

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude of each input, (I,) fp64."""
        return self._sizes / self._count()

    @property
    def hessian(self) -> Tensor:
        """Mean of x x^T, (I, I) fp64: the output error of a change D of a row is D^T H D.

        Raises:
            ConfigError: it was not asked for.
        """
        if self._products is None:
            raise ConfigError("These statistics hold norms only. Ask for the hessian when they are made.")
        return self._products / self._count()

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once for all matrices that read these inputs; `key` says what it is."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[return-value]

    def divided(self, factors: Tensor) -> Stats:
        """What the sums would be of inputs that were divided by `factors` (I,)."""
        other = Stats(self.columns, needs=())
        other.tokens = self.tokens
        factors = factors.double()
        other._squares, other._sizes = self._squares / factors.square(), self._sizes / factors
        if self._products is not None:
            other._products = self._products / torch.outer(factors, factors)
        return other

    def _count(self) -> int:
        if not self.tokens:
            raise ConfigError("There is no calibration text. Give at least one token.")
        return self.tokens
