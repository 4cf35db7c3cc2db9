"""The tokens before a position, counted as the penalties need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from plait.errors import ConfigError

__all__ = ["History", "TokenCounts", "token_ids"]

_LARGEST_ID = 2**31 - 1


class TokenCounts(NamedTuple):
    """Every distinct token of a history; the arrays are views that the next change invalidates.

    `ids` (n,) int64 in order of first appearance; `generated` (n,) int64 how often each was generated;
    `in_prompt` (n,) bool whether the prompt has it. After `History.truncate` a token may have neither.
    """

    ids: npt.NDArray[np.int64]
    generated: npt.NDArray[np.int64]
    in_prompt: npt.NDArray[np.bool_]


class History:
    """What a sampler may know of the tokens so far: prompt and generated tokens, with counts.

    `append` takes constant time, whatever the length. `len` is the absolute position of the next token.

    Args:
        prompt: ids of the prompt, an iterable or a tensor of one dimension.
        generated: ids generated so far.

    Raises:
        ConfigError: an id is not a whole number in [0, 2**31).
    """

    def __init__(self, prompt: Iterable[int] | Tensor = (), generated: Iterable[int] | Tensor = ()) -> None:
        prompt_ids = _checked_ids(prompt)
        distinct = np.unique(prompt_ids)
        self.prompt_length = len(prompt_ids)
        self._generated: list[int] = []
        self._slot_of = {token: slot for slot, token in enumerate(distinct.tolist())}
        capacity = max(16, 2 * len(distinct))
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._counts = np.zeros(capacity, dtype=np.int64)
        self._in_prompt = np.zeros(capacity, dtype=np.bool_)
        self._ids[: len(distinct)] = distinct
        self._in_prompt[: len(distinct)] = True
        self.extend(generated)

    def __len__(self) -> int:
        return self.prompt_length + len(self._generated)

    def __repr__(self) -> str:
        return f"<History of {self.prompt_length} prompt and {len(self._generated)} generated tokens>"

    @property
    def generated(self) -> tuple[int, ...]:
        """The ids generated so far."""
        return tuple(self._generated)

    def append(self, token: int) -> None:
        """Add one generated token."""
        self.extend((token,))

    def extend(self, tokens: Iterable[int] | Tensor) -> None:
        """Add generated tokens in order.

        Raises:
            ConfigError: an id is not a whole number in [0, 2**31); nothing was added.
        """
        for token in _checked_ids(tokens).tolist():
            slot = self._slot_of.setdefault(token, len(self._slot_of))
            if slot == len(self._ids):
                self._grow()
            self._ids[slot] = token
            self._counts[slot] += 1
            self._generated.append(token)

    def truncate(self, length: int) -> None:
        """Forget the last generated tokens so that `length` tokens are left, prompt included.

        Raises:
            ConfigError: `length` would cut the prompt or is longer than the history.
        """
        if not self.prompt_length <= length <= len(self):
            raise ConfigError(
                f"This history can be cut to {self.prompt_length} to {len(self)} tokens. Got {length}."
            )
        for token in self._generated[length - self.prompt_length :]:
            self._counts[self._slot_of[token]] -= 1
        del self._generated[length - self.prompt_length :]

    def fork(self) -> History:
        """An equal history that changes on its own."""
        twin = History()
        twin.prompt_length = self.prompt_length
        twin._generated = self._generated.copy()
        twin._slot_of = self._slot_of.copy()
        twin._ids, twin._counts, twin._in_prompt = (
            self._ids.copy(),
            self._counts.copy(),
            self._in_prompt.copy(),
        )
        return twin

    def counts(self) -> TokenCounts:
        """The distinct tokens and how often each occurs."""
        used = len(self._slot_of)
        return TokenCounts(self._ids[:used], self._counts[:used], self._in_prompt[:used])

    def _grow(self) -> None:
        size = len(self._ids)
        self._ids = np.pad(self._ids, (0, size))
        self._counts = np.pad(self._counts, (0, size))
        self._in_prompt = np.pad(self._in_prompt, (0, size))


def token_ids(tokens: Iterable[int] | Tensor, vocab_size: int) -> list[int]:
    """Ids of a vocabulary, as plain numbers.

    Raises:
        ConfigError: one is not a whole number in [0, vocab_size).
    """
    found: list[int] = _checked_ids(tokens, vocab_size - 1).tolist()
    return found


def _checked_ids(tokens: Iterable[int] | Tensor, largest: int = _LARGEST_ID) -> npt.NDArray[np.int64]:
    given: Any = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else tokens
    if not isinstance(given, np.ndarray):
        # Looked at one by one, since numpy would read a list with one fraction as all fractions.
        given = list(given)
        wrong = [token for token in given if not _is_id(token, largest)]
    elif given.ndim == 1 and (np.issubdtype(given.dtype, np.integer) or not given.size):
        wrong = given[(given < 0) | (given > largest)].tolist()
    else:
        raise ConfigError(
            f"Token ids must be whole numbers in one dimension. Got {given.dtype} of shape {given.shape}."
        )
    if wrong:
        raise ConfigError(f"Token ids must be whole numbers in [0, {largest + 1}). Got {wrong[0]!r}.")
    return np.asarray(given, dtype=np.int64)


def _is_id(token: object, largest: int) -> bool:
    return (
        isinstance(token, (int, np.integer)) and not isinstance(token, bool) and bool(0 <= token <= largest)
    )
