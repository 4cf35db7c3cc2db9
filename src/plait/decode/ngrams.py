"""Counts of what followed short runs of tokens in a text.

A context of n tokens is known by a 64-bit hash; two contexts of one text share one with a chance of about
its length squared over 2**64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from plait.errors import ConfigError

__all__ = ["NgramCounts"]

# Weights of contexts of 1 to 5 tokens, as tuned by Shen et al. 2024, arXiv:2405.18400.
_WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class NgramCounts:
    """What followed every run of 1 to 5 tokens in some texts.

    Args:
        texts: token ids of each text; runs do not reach from one text into the next.

    Raises:
        ConfigError: an id is negative or above 2**31.
    """

    def __init__(self, texts: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(text, dtype=np.int64) for text in texts]
        if any(len(array) and not 0 <= array.min() <= array.max() < 2**31 for array in arrays):
            raise ConfigError("Token ids must be whole numbers in [0, 2**31).")
        self._orders = [_Order(arrays, length) for length in range(1, len(_WEIGHTS) + 1)]

    def mixture(self, tokens: Sequence[int], candidates: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Weighted sum, over contexts of 1 to 5 last tokens, of each candidate's share of what followed.

        A context that was never seen adds nothing.

        Args:
            tokens: the text so far.
            candidates: (m,) ids.

        Returns:
            (m,), 0 for a candidate that followed none of the contexts.
        """
        out = np.zeros(len(candidates))
        for length, (weight, order) in enumerate(zip(_WEIGHTS, self._orders, strict=True), start=1):
            if len(tokens) >= length:
                out += weight * order.shares(tokens[-length:], candidates)
        return out

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(order.nbytes() for order in self._orders)


class _Order:
    """Contexts of one length: sorted hashes, and for each the tokens that followed, sorted, and how often."""

    def __init__(self, texts: Sequence[npt.NDArray[np.int64]], length: int) -> None:
        hashes, following = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for text in texts:
            if len(text) > length:
                windows = np.lib.stride_tricks.sliding_window_view(text, length)[:-1]
                hashes.append(_hash(windows))
                following.append(text[length:])
        key = np.concatenate(hashes)
        token = np.concatenate(following).astype(np.int32)
        order = np.lexsort((token, key))
        key, token = key[order], token[order]
        is_new = np.ones(len(key), dtype=np.bool_)
        is_new[1:] = (key[1:] != key[:-1]) | (token[1:] != token[:-1])
        first = np.flatnonzero(is_new)
        self.counts = np.diff(np.append(first, len(key))).astype(np.int32)
        self.tokens = token[first]
        self.contexts, self.starts = np.unique(key[first], return_index=True)

    def shares(self, context: Sequence[int], candidates: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        key = _hash(np.array([context], dtype=np.int64))[0]
        place = int(np.searchsorted(self.contexts, key))
        if place == len(self.contexts) or self.contexts[place] != key:
            return np.zeros(len(candidates))
        stop = self.starts[place + 1] if place + 1 < len(self.starts) else len(self.tokens)
        run = slice(int(self.starts[place]), int(stop))
        tokens, counts = self.tokens[run], self.counts[run]
        at = np.minimum(np.searchsorted(tokens, candidates), len(tokens) - 1)
        shares: npt.NDArray[np.float64] = np.where(tokens[at] == candidates, counts[at] / counts.sum(), 0.0)
        return shares

    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.counts, self.tokens, self.contexts, self.starts))


def _hash(windows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each row of (n, length)."""
    out = np.zeros(len(windows), dtype=np.uint64)
    for column in windows.astype(np.uint64).T:
        out = (out ^ (column + np.uint64(1))) * _MULTIPLIER
        out ^= out >> np.uint64(29)
    return out
