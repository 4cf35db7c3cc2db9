"""Recursive rejection sampling: which drawn guesses a law accepts, so that what comes out has that law.

Sources: Leviathan et al. 2023, arXiv:2211.17192 (one draw); Miao et al. 2024, arXiv:2305.09781, section 4.3
(several draws with replacement); Jeon et al. 2024, arXiv:2402.14160, section 3.1 (without replacement).

Exact because, if x has law q and what follows a rejection has law norm((t - q)+), the outcome has law t;
this applied from the last round backwards. Shapes: V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from plait.errors import ConfigError

__all__ = ["Rejection"]

# Below this only rounding is left of a residual: the draft law covers the target, and acceptance was certain.
_ROUNDING = 1e-12


class Rejection:
    """The rounds at one node: the target law t, and the law q of the next draw, after the rejections so far.

    Args:
        target: t, (V,), non-negative with a positive sum.
        draft: q of the first draw, (V,), likewise.
        replacement: whether every draw has the same law; else a token that was drawn is not drawn again.
    """

    def __init__(self, target: Tensor, draft: Tensor, *, replacement: bool) -> None:
        self.target = _normalised(target.detach().double().numpy())
        self.draft = _normalised(draft.detach().double().numpy())
        self.replacement = replacement

    def accepts(self, token: int, uniform: float) -> bool:
        """Whether the next draw is kept, given a fresh number in [0, 1).

        Raises:
            ConfigError: the draft law cannot have drawn this token.
        """
        if not self.draft[token] > 0:
            raise ConfigError(
                f"A draft tree says that token {token} was drawn, but its draft law cannot have drawn it here. "
                "Propose it as a node that was not drawn."
            )
        return bool(uniform * self.draft[token] < self.target[token])

    def acceptance(self, token: int) -> float:
        """Probability that `accepts` keeps this draw."""
        return float(min(1.0, self.target[token] / self.draft[token]))

    def reject(self, token: int) -> None:
        """Go on to the round after a draw that was not kept."""
        residual = np.maximum(self.target - self.draft, 0.0)
        if residual.sum() >= _ROUNDING:
            self.target = _normalised(residual)
        if not self.replacement:
            left = self.draft.copy()
            left[token] = 0.0
            self.draft = _normalised(left) if left.sum() > 0 else left


def _normalised(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    law: npt.NDArray[np.float64] = weights / weights.sum()
    return law
