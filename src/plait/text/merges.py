"""Which tokens may follow each other inside a word of a byte-pair vocabulary.

A sequence of tokens is the encoding of its own bytes if and only if each pair of neighbours is: the first
merge that joins two neighbours does so while both are still made on their own, so it happens in the pair
too. Merging is Sennrich et al. 2016, arXiv:1508.07909, as applied to a text: the earliest rule first, and
the leftmost place first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Merges"]


class Merges:
    """The merge rules of a vocabulary.

    Args:
        rules: pairs of ids and the id that they are joined to, from the first rule to the last.
        letters: for each id, the ids that a merge starts from; empty for a token that no text becomes.
        tokenise: the ids of two tokens' pieces, written one after the other.
    """

    def __init__(
        self,
        rules: Sequence[tuple[int, int, int]],
        letters: Callable[[int], list[int]],
        tokenise: Callable[[int, int], list[int]],
        vocab_size: int,
    ) -> None:
        self._rules = {(left, right): (rank, joined) for rank, (left, right, joined) in enumerate(rules)}
        self._letters = letters
        self._tokenise = tokenise
        self.vocab_size = vocab_size
        self._by_left: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for (left, right), (rank, _) in self._rules.items():
            self._by_left[left].append((right, rank))
        self._starts: Mapping[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] | None = None
        self._reachable: npt.NDArray[np.bool_] | None = None

    @property
    def reachable(self) -> npt.NDArray[np.bool_]:
        """Which tokens their own text becomes, (V,)."""
        self._read_starts()
        assert self._reachable is not None
        return self._reachable

    def may_follow(self, token: int) -> npt.NDArray[np.bool_]:
        """Which tokens stay apart from `token` when they are written right after it, (V,)."""
        self._read_starts()
        assert self._starts is not None
        allowed = self.reachable.copy()
        ends, _ = self._ends(self._letters(token), last=True)
        suspects = []
        for end, lifetime in ends:
            for start, rank in self._by_left[end]:
                # Later than what takes its left part away, a rule finds nothing to join.
                if rank < lifetime and start in self._starts:
                    tokens, lifetimes = self._starts[start]
                    suspects.append(tokens[rank <= lifetimes])
        if suspects:
            # These may be joined; whether they are depends on which comes first, so they are tried.
            for other in np.unique(np.concatenate(suspects)).tolist():
                if allowed[other]:
                    allowed[other] = self._tokenise(token, other) == [token, other]
        return allowed

    def _ends(self, symbols: list[int], *, last: bool) -> tuple[list[tuple[int, int]], list[int]]:
        """What stands at one end while a token is made, with the largest rank up to which it stays."""
        symbols = list(symbols)
        place = -1 if last else 0
        never = len(self._rules)
        history: list[list[int]] = [[symbols[place], -1]] if symbols else []
        while len(symbols) > 1:
            best, where = never, -1
            for index in range(len(symbols) - 1):
                rule = self._rules.get((symbols[index], symbols[index + 1]))
                if rule is not None and rule[0] < best:
                    best, where = rule[0], index
            if where < 0:
                break
            history[-1][1] = max(history[-1][1], best)
            symbols[where : where + 2] = [self._rules[symbols[where], symbols[where + 1]][1]]
            if symbols[place] != history[-1][0]:
                history.append([symbols[place], -1])
        if history:
            history[-1][1] = never
        return [(symbol, lifetime) for symbol, lifetime in history], symbols

    def _read_starts(self) -> None:
        if self._starts is not None:
            return
        found: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        reachable = np.zeros(self.vocab_size, dtype=np.bool_)
        for token in range(self.vocab_size):
            letters = self._letters(token)
            if not letters:
                continue
            starts, symbols = self._ends(letters, last=False)
            reachable[token] = symbols == [token]
            if reachable[token]:
                for start, lifetime in starts:
                    found[start][0].append(token)
                    found[start][1].append(lifetime)
        self._starts = {
            start: (np.array(tokens), np.array(lives)) for start, (tokens, lives) in found.items()
        }
        self._reachable = reachable
