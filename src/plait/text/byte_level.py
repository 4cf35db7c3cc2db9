"""Byte-level vocabularies seen from bytes: text is cut into words, and bytes merge inside a word.

Where a word ends depends on the kinds of characters around, and sometimes on what follows. What is cut is
therefore asked of the tokenizer itself, once for each *shape*: characters that no rule tells apart are
written as one, so that ` hello` and ` weather` have the same shape.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from plait.errors import ConfigError, IncompatibleError
from plait.text.byte_vocabulary import ByteVocabulary, Ids, Mask, completions, split_dangling
from plait.text.tokenizer import Tokenizer
from plait.text.vocabulary import byte_level_alphabet

__all__ = ["ByteLevelBytes"]

_Cuts = frozenset[int]
# What a token may do at the end of the text: join its last word, start another, either or neither.
_JOINS, _STARTS = 1, 2
# What may follow a space or an apostrophe and move the cuts before it: rules look ahead there.
_AFTER_SPACE = ("", "a", "0", "!", " ", "\n")
_AFTER_APOSTROPHE = ("", "a", "s", "t", "m", "d", "e", "l", "re", "ve", "ll")
# Most characters of a block that are looked at one by one.
_SAMPLES = 16384
_APOSTROPHES = ("'", "\u2019")
# Blocks of scripts that some rules name.
_BLOCKS = (range(0x0800, 0x9FA6), range(0x3040, 0x3100), range(0x4E00, 0x9FA6), range(0xAC00, 0xD800))
# Spaces at which a new stretch of text starts, counted back from the end; words before them are settled.
_STRETCHES = 3


@dataclass(frozen=True)
class _Context:
    """The end of a text, from a place on where nothing that follows moves the cuts before it.

    Args:
        text: its whole characters.
        tail: the bytes of a character that is not whole.
    """

    text: str
    tail: bytes


class ByteLevelBytes(ByteVocabulary):
    """Pieces over bytes, inside words.

    Raises:
        IncompatibleError: the tokenizer normalises text.
    """

    def __init__(
        self, tokenizer: Tokenizer, backend: tokenizers.Tokenizer, description: dict[str, Any]
    ) -> None:
        if description.get("normalizer") is not None:
            raise IncompatibleError(
                f"This model's tokenizer changes text ({description['normalizer']['type']}), so bytes have no exact "
                "probability."
            )
        cut: PreTokenizer = tokenizer.package_tokenizer.pre_tokenizer
        backend.pre_tokenizer = cut
        if cut.pre_tokenize_str("a")[0][0] != "a":
            raise IncompatibleError(
                "This model's tokenizer puts a space before text; exact bytes need it without."
            )
        self._cut = cut
        # Some vocabularies lack bytes that their training text did not have.
        self._letter_of = [tokenizer.id_of(letter) for letter in _alphabet()]
        self._alphabet = _alphabet()
        super().__init__(tokenizer, backend, description)
        self._kinds: dict[object, str] = {}
        self._relations: dict[_Context, list[npt.NDArray[np.int8]]] = {}
        self._examples: dict[bytes, list[str]] = {}

    def letters(self, token: int) -> list[int]:
        ids = [] if token in self.added else [self._letter_of[byte] for byte in self.texts[token]]
        return [id for id in ids if id is not None] if None not in ids else []

    def encodings(self, data: bytes) -> list[Ids]:
        text, tail = split_dangling(data)
        whole = tuple(self.encode(text))
        context = self._context(whole, text, tail, 0)
        ways = list(dict.fromkeys(self._ends(context)))
        if not tail and len(ways) == 1:
            return self.check_faithful([whole], data)
        before = self.encode(text[: len(text) - len(context.text)])
        return self.check_faithful([(*before, *ends) for ends in ways], data)

    def may_end(self, ids: Sequence[int], data: bytes) -> bool:
        text, tail = split_dangling(_last_part(data, 64 * self.longest))
        ends = self._ends(self._context(ids, text, tail, len(tail)))[0]
        return not tail and (not ends or tuple(ids[-len(ends) :]) == ends)

    def allowed(self, ids: Sequence[int], data: bytes) -> Mask:
        text, tail = split_dangling(_last_part(data, 64 * self.longest))
        context = self._context(ids, text, tail, len(tail))
        relations = self._relations_of(context)
        mask = np.zeros(self.vocab_size, dtype=np.bool_)
        starts = np.ones_like(mask) if self.ignores_merges else self.merges.reachable
        for cuts, ends, relation in zip(self._all_cuts(context), self._ends(context), relations, strict=True):
            if not ends or tuple(ids[-len(ends) :]) == ends:
                mask |= (relation & _STARTS > 0) & starts
                if ends:
                    joined = (relation & _JOINS > 0) & self.may_follow(ends[-1])
                    if self.ignores_merges:
                        joined &= ~self._whole_words(context, cuts)
                    mask |= joined
        return mask

    def _whole_words(self, context: _Context, cuts: _Cuts) -> Mask:
        """Tokens that make one token of the word that they join, whatever merging says."""
        word = context.text[max(cuts, default=0) :].encode() + context.tail
        mask = np.zeros(self.vocab_size, dtype=np.bool_)
        wholes = {self.texts[id][len(word) :] for id in self.starting_with(word).tolist()} - {b""}
        for rest in wholes:
            same = self.starting_with(rest)
            mask[same[self.lengths[same] == len(rest)]] = True
        return mask

    def _context(self, ids: Sequence[int], text: str, tail: bytes, held: int) -> _Context:
        """Where the end of the text starts; see `_Context`. The ids hold `held` bytes more than the text."""
        if self.added:
            size = 0
            for id in reversed(ids):
                if id in self.added or size > 4 * len(text) + held:
                    break
                size += len(self.texts[id])
            data = text.encode()
            text = data[max(0, len(data) + held - size) :].decode()
        place, found = len(text), 0
        while place > 1 and found < _STRETCHES:
            place -= 1
            found += text[place].isspace() and not text[place - 1].isspace()
        text = text[place:] if found == _STRETCHES else text
        words = [span for _, span in self._cut.pre_tokenize_str(text)] if text else []
        first = len(words) - 1
        while first > 0:
            start, stop = words[first]
            if text[start:stop].isspace():
                first -= 1
            elif text[start].isspace():
                break
            else:
                # A word glued to the one before it may still become part of it.
                first -= 1
                break
        while first > 0 and text[words[first][0] : words[first][1]].isspace():
            first -= 1
        return _Context(text[words[first][0] :] if words else "", tail)

    def _endings(self, text: str, tail: bytes) -> Sequence[str]:
        """What may follow and move a cut: a character of each kind that was begun, or what rules look ahead at."""
        if tail:
            if tail not in self._examples:
                found: dict[object, str] = {}
                for part in completions(tail):
                    for point in part[:: 1 + len(part) // _SAMPLES]:
                        found.setdefault(_kind(chr(point)), chr(point))
                self._examples[tail] = list(found.values())
            return self._examples[tail]
        if text[-1:].isspace():
            return _AFTER_SPACE
        return _AFTER_APOSTROPHE if any(mark in text[-2:] for mark in _APOSTROPHES) else ("",)

    def _cuts_of(self, text: str) -> _Cuts:
        return (
            frozenset(start for _, (start, _) in self._cut.pre_tokenize_str(text)) - {0}
            if text
            else frozenset()
        )

    def _all_cuts(self, context: _Context) -> list[_Cuts]:
        """The ways in which the context may be cut, by what is at its end or follows; the first if nothing does."""
        size = len(context.text) + bool(context.tail)
        ways = (self._cuts_of(context.text + end) for end in self._endings(context.text, context.tail))
        return list(dict.fromkeys(frozenset(cut for cut in cuts if cut < size) for cuts in ways))

    def _ends(self, context: _Context) -> list[Ids]:
        """The tokens of the context for each of `_all_cuts`."""
        found = []
        for cuts in self._all_cuts(context):
            places = [0, *sorted(cuts), len(context.text)]
            words = [context.text[a:b].encode() for a, b in itertools.pairwise(places)]
            words[-1] += context.tail
            found.append(tuple(id for word in words if word for id in self._tokenise(word)))
        return found

    def _tokenise(self, word: bytes) -> list[int]:
        return [
            token.id for token in self.backend.model.tokenize("".join(self._alphabet[byte] for byte in word))
        ]

    def _relations_of(self, context: _Context) -> list[npt.NDArray[np.int8]]:
        """What each token does after the context, (V,) for each of `_all_cuts`."""
        literal = any(mark in context.text for mark in _APOSTROPHES)
        shape = context if literal else _Context(self._shape(context.text), context.tail)
        return self.remember(self._relations, shape, lambda: self._read_relations(shape, literal))

    def _read_relations(self, context: _Context, literal: bool) -> list[npt.NDArray[np.int8]]:
        all_cuts = self._all_cuts(context)
        relations = [np.zeros(self.vocab_size, dtype=np.int8) for _ in all_cuts]
        if literal or context.tail:
            # Letters after an apostrophe, and the rest of a character, are looked at one by one.
            for token, text in enumerate(self.texts):
                if text and bool(context.tail) == (text[0] & 0xC0 == 0x80):
                    for relation, value in zip(relations, self._relate(context, all_cuts, text), strict=True):
                        relation[token] = value
            return relations
        forms, form_of = self._token_forms
        related = [
            [0] * len(all_cuts)
            if not form or form[0] & 0xC0 == 0x80
            else self._relate(context, all_cuts, form)
            for form in forms
        ]
        return [np.array(values, dtype=np.int8)[form_of] for values in zip(*related, strict=True)]

    @functools.cached_property
    def _token_forms(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """The shapes of all tokens' texts, and which one each token has, (V,)."""
        numbers: dict[bytes, int] = {}
        form_of = [numbers.setdefault(self._form(text), len(numbers)) for text in self.texts]
        return list(numbers), np.array(form_of, dtype=np.int64)

    def _relate(self, context: _Context, all_cuts: list[_Cuts], text: bytes) -> list[int]:
        values = [0] * len(all_cuts)
        try:
            whole, tail = split_dangling(context.tail + text)
        except ConfigError:
            return values
        size = len(context.text)
        written = context.text + whole
        for end in self._endings(written, tail):
            after = {cut for cut in self._cuts_of(written + end) if cut < len(written) + bool(tail)}
            for index, cuts in enumerate(all_cuts):
                if after == cuts:
                    values[index] |= _JOINS if size or context.tail else _STARTS
                elif not context.tail and size and after == cuts | {size}:
                    values[index] |= _STARTS
        return values

    def _form(self, text: bytes) -> bytes:
        """The shape of a token; that of one with apostrophes or half characters is itself."""
        try:
            written = text.decode()
        except UnicodeDecodeError:
            return text
        return text if any(mark in written for mark in _APOSTROPHES) else self._shape(written).encode()

    def _shape(self, text: str) -> str:
        """The text with one character for each kind, and long runs shortened; digits are counted by rules."""
        shape: list[str] = []
        for character in text:
            example = self._kinds.setdefault(_kind(character), character)
            if shape[-3:] != [example] * 3 or example.isnumeric():
                shape.append(example)
        return "".join(shape)


@functools.lru_cache(maxsize=65536)
def _kind(character: str) -> object:
    """What the rules of known tokenizers can tell of a character."""
    point = ord(character)
    if point < 0x80:
        if character.isalpha():
            return "upper" if character.isupper() else "lower"
        return "digit" if character.isdigit() else character
    return (
        unicodedata.category(character),
        character if character.isspace() else "",
        tuple(point in block for block in _BLOCKS),
    )


def _alphabet() -> Sequence[str]:
    """The letter by which pieces write each byte."""
    letters = [""] * 256
    for letter, byte in byte_level_alphabet().items():
        letters[byte] = letter
    return letters


def _last_part(data: bytes, size: int) -> bytes:
    """The last bytes of a text, about `size` of them, from the start of a character on."""
    if len(data) <= size:
        return data
    start = len(data) - size
    while start < len(data) and data[start] & 0xC0 == 0x80:
        start += 1
    return data[start:]
