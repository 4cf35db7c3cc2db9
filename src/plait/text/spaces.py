"""SentencePiece's rule that a text starts with a space, where special tokens are part of the text."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["SpacePrefix"]


class SpacePrefix:
    """Puts a space before every stretch of text: at the start, and after special tokens.

    Each stretch is then encoded as SentencePiece encodes it alone (`add_dummy_prefix`).

    Args:
        names: the special tokens, as they are written in text.
        swallowing: those that swallow the white space after them.
    """

    def __init__(self, names: Iterable[str], swallowing: Iterable[str] = ()) -> None:
        # Of two names that start alike, the longer one counts.
        longest_first = sorted(names, key=len, reverse=True)
        self._names = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        )
        self._swallowing = frozenset(swallowing)

    def apply(self, text: str, *, parse_special: bool) -> str:
        """The text with its spaces; names count as special tokens only if `parse_special`."""
        if not parse_special or self._names is None:
            return " " + text if text else text
        written, special = [], ""
        # Splitting at a group returns text and names by turns.
        for position, part in enumerate(self._names.split(text)):
            if position % 2:
                special = part
                written.append(part)
            else:
                stretch = part.lstrip() if special in self._swallowing else part
                written.append(" " + stretch if stretch else "")
        return "".join(written)
