"""The past of a recurrent mixer: a state of constant size, and how the states of two chunks compose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

from torch import Tensor

__all__ = ["State"]


@runtime_checkable
class State(Protocol):
    """What a recurrent layer keeps of a sequence.

    A chunk of tokens acts on the state as an affine map S -> A S + B. Maps compose associatively:
    `earlier.compose(later)` is the state after both chunks. Order matters, and the identity is the
    state of no tokens.
    """

    def __len__(self) -> int:
        """Number of tokens folded in."""
        ...

    def compose(self, later: Self) -> Self:
        """The state after this chunk and then `later`."""
        ...

    def fork(self) -> Self:
        """An independent copy."""
        ...

    def commit(self, path: Sequence[int] | Tensor | None = None) -> None:
        """Accept the rows folded in since the last commit.

        Raises:
            IncompatibleError: `path` leaves out a row; a state cannot forget one token.
        """
        ...

    def truncate(self, length: int) -> None:
        """Return to an earlier length.

        Raises:
            IncompatibleError: for any length but the present one and 0; a state cannot forget one token.
        """
        ...

    def nbytes(self) -> int:
        """Bytes of the state; they do not grow with the sequence."""
        ...
