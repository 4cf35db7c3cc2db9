"""What a generation may say, as a mask over the vocabulary at every node.

A `Constraint` is what was asked for: it never changes, so that requests can share it. A `Guide` is that
constraint while one sequence runs. The sampler asks it what may follow the tokens so far, also at the nodes
of a draft tree, so that greedy, sampled and speculative decoding all obey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Constraint", "Guide"]


class Guide(Protocol):
    """A constraint on one sequence."""

    def allowed(self, generated: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        """Which tokens may follow.

        Args:
            generated: the tokens behind the prompt. Calls may go forward and back, as a walk through a
                draft tree does.

        Returns:
            (V,) with at least one True; None where anything may follow. That is also the answer for tokens
            that the constraint does not allow themselves, which only a speculator tries, and behind the end.
        """
        ...


class Constraint(Protocol):
    """What a generation may say."""

    def start(self) -> Guide:
        """A guide for a new sequence; may be called from any thread."""
        ...
