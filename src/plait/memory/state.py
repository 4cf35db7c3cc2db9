"""The past of a recurrent mixer: a state of constant size, and how the states of two chunks compose.

Shapes: H heads, F features of a key, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError

__all__ = ["LinearState", "State"]


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
        """An independent state with the same past; pending rows are committed in both."""
        ...

    def commit(self, path: Sequence[int] | Tensor | None = None, *, is_prompt: bool = False) -> None:
        """Accept the rows folded in since the last commit.

        Raises:
            IncompatibleError: `path` leaves out a row; a state cannot forget one token.
        """
        ...

    def truncate(self, length: int) -> None:
        """Return to the length at the last commit, or to 0.

        Raises:
            IncompatibleError: for any other length but the present one.
        """
        ...

    def check_commit(self, path: Sequence[int] | Tensor | None = None) -> object:
        """Raise the error that `commit(path)` would raise; changes nothing."""
        ...

    def check_truncate(self, length: int) -> object:
        """Raise the error that `truncate(length)` would raise; changes nothing."""
        ...

    def nbytes(self) -> int:
        """Bytes of the state; they do not grow with the sequence."""
        ...


class LinearState:
    """The state of linear attention with one fixed decay for each head: S <- a S + k v^T per token.

    `sums` is replaced by every update, never written to, so that the state at the last commit can be
    kept beside it for as long as rows are pending.

    Args:
        log_decay: (H,) natural log of the decay a of a token, each at most 0; kept without a copy.
        sums: (H, F, V) decayed sum of k v^T over the tokens; kept without a copy.
        length: number of tokens folded in.
    """

    def __init__(self, log_decay: Tensor, sums: Tensor, length: int = 0) -> None:
        self.log_decay = log_decay
        self.sums = sums
        self.length = length
        self._committed: tuple[Tensor, int] | None = None

    @classmethod
    def empty(cls, log_decay: Tensor, num_features: int, value_dim: int) -> LinearState:
        """The state of no tokens, the identity of `compose`; dtype and device are those of `log_decay`."""
        return cls(log_decay, log_decay.new_zeros(log_decay.shape[0], num_features, value_dim))

    def __len__(self) -> int:
        return self.length

    @property
    def pending(self) -> int:
        """Number of tokens folded in since the last commit."""
        return 0 if self._committed is None else self.length - self._committed[1]

    def advance(self, sums: Tensor, num_tokens: int) -> None:
        """Take the sums after `num_tokens` more tokens; they are pending until `commit`.

        Args:
            sums: (H, F, V); its gradient is cut off.
            num_tokens: how many tokens were folded in.
        """
        if self._committed is None:
            self._committed = self.sums, self.length
        self.sums = sums.detach()
        self.length += num_tokens

    def compose(self, later: LinearState) -> LinearState:
        """The state after this chunk and then `later`, whose decay must be the same.

        Raises:
            ConfigError: the states are of different shapes.
        """
        if self.sums.shape != later.sums.shape:
            raise ConfigError(
                "compose takes two states of one layer. "
                f"Got shapes {tuple(self.sums.shape)} and {tuple(later.sums.shape)}."
            )
        decay = (later.length * later.log_decay).exp()[:, None, None]
        return LinearState(self.log_decay, decay * self.sums + later.sums, self.length + later.length)

    def fork(self) -> LinearState:
        """A state with the same past; both share the tensor, which neither writes to."""
        self.commit()
        return LinearState(self.log_decay, self.sums, self.length)

    def commit(self, path: Sequence[int] | Tensor | None = None, *, is_prompt: bool = False) -> None:
        """Accept the pending rows, all of them; see `State.commit`."""
        self.check_commit(path)
        self._committed = None

    def truncate(self, length: int) -> None:
        """Return to the length at the last commit, or to 0; see `State.truncate`."""
        self.check_truncate(length)
        if length == self.length:
            return
        if length == 0:
            self.sums, self.length = torch.zeros_like(self.sums), 0
        elif self._committed is not None:
            self.sums, self.length = self._committed
        self._committed = None

    def check_commit(self, path: Sequence[int] | Tensor | None = None) -> None:
        """Raise the error that `commit(path)` would raise."""
        if path is not None and [int(row) for row in path] != list(range(self.pending)):
            raise IncompatibleError(
                f"The state of linear-attention cannot leave out one of {self.pending} pending rows, as a "
                "rejected draft does. Use draft='none' with this model."
            )

    def check_truncate(self, length: int) -> None:
        """Raise the error that `truncate(length)` would raise."""
        if not 0 <= length <= self.length:
            raise ConfigError(f"truncate takes a length from 0 to {self.length}. Got {length}.")
        committed = self.length - self.pending
        if length not in (0, committed, self.length):
            raise IncompatibleError(
                f"The state of linear-attention cannot go back from {self.length} tokens to {length}. "
                "Truncate to 0 and read the sequence again, or fork before the part that may be undone."
            )

    def nbytes(self) -> int:
        """Bytes of the state, twice that while rows are pending."""
        kept = self.sums.nbytes
        return kept if self._committed is None else kept + self._committed[0].nbytes
