"""Text that arrives one token at a time: whole characters only, and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plait.errors import ConfigError
from plait.text.tokenizer import Tokenizer

__all__ = ["StopStrings", "StreamDecoder"]


class StreamDecoder:
    """Decodes ids one by one into text that never ends inside a UTF-8 character.

    For every sequence of ids, the pushed texts and `finish()` together are exactly
    `tokenizer.decode(ids)` with the same settings.

    Args:
        tokenizer: the tokenizer of the model that makes the ids.
        skip_special: leave special tokens out; otherwise their names are shown.
        continues: the ids follow earlier text, so a space at their start is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strips = tokenizer.strips_leading_space and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Add an id; returns the text that is complete now, which may be empty.

        Raises:
            ConfigError: the id is outside the vocabulary; the stream goes on as if it had not come.
        """
        data = self._tokenizer.shown_bytes(id, skip_special=self._skip_special)
        if self._strips and data:
            data = data.removeprefix(b" ")
            self._strips = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The rest of the text: bytes that never became a character, as U+FFFD. Ends the stream."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Looks for stop strings in text that arrives in pieces, across the borders of the pieces.

    The text ends at the stop string that is complete first; if several end at the same character,
    at the longest of them. How the text was cut into pieces makes no difference. Each character
    takes constant time for each stop string (Knuth, Morris and Pratt 1977).

    Args:
        stops: the strings to look for; may be none.
        include: whether the text that is returned includes the stop string.

    Attributes:
        found: the stop string that ended the text, or None so far.

    Raises:
        ConfigError: a stop string is empty.
    """

    found: str | None

    def __init__(self, stops: Iterable[str], *, include: bool = False) -> None:
        if isinstance(stops, str):
            raise ConfigError(f"Stop strings must be a list of text. Got the text {stops!r}.")
        self._matchers = [_Matcher(stop) for stop in dict.fromkeys(stops)]
        self._include = include
        self._held = ""
        self.found = None

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns the text that no stop string can reach any more, and whether one was found.

        After a stop string was found, all further text is dropped.
        """
        if self.found is not None:
            return "", True
        text = self._held + text
        for position in range(len(self._held), len(text)):
            complete = [matcher.stop for matcher in self._matchers if matcher.advance(text[position])]
            if complete:
                self.found = max(complete, key=len)
                self._held = ""
                end = position + 1
                return text[: end if self._include else end - len(self.found)], True
        # Only the longest start of a stop string that ends the text has to wait.
        held = max((matcher.matched for matcher in self._matchers), default=0)
        emitted = len(text) - held
        self._held = text[emitted:]
        return text[:emitted], False

    def finish(self) -> str:
        """The text still held back: a start of a stop string that was never completed."""
        held, self._held = self._held, ""
        return held


@dataclass(slots=True)
class _Matcher:
    """How much of one stop string the text ends with."""

    stop: str
    matched: int = 0
    fallback: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.stop, str) or not self.stop:
            raise ConfigError(f"A stop string must be text of at least one character. Got {self.stop!r}.")
        # fallback[n]: the longest start of `stop` that is also a proper end of its first n + 1 characters.
        fallback = [0] * len(self.stop)
        for position in range(1, len(self.stop)):
            length = fallback[position - 1]
            while length and self.stop[position] != self.stop[length]:
                length = fallback[length - 1]
            fallback[position] = length + (self.stop[position] == self.stop[length])
        self.fallback = fallback

    def advance(self, character: str) -> bool:
        """Take one more character; returns whether the stop string is complete."""
        while self.matched and character != self.stop[self.matched]:
            self.matched = self.fallback[self.matched - 1]
        self.matched += character == self.stop[self.matched]
        return self.matched == len(self.stop)
