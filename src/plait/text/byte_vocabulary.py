"""A tokenizer seen from bytes: what it makes of any bytes, and which tokens it may put after others.

A token sequence is *valid* if it is what the tokenizer makes of its own bytes, or the beginning of what it
makes of them and more. Mostly there is exactly one for given bytes; inside a character, and after spaces where
a rule looks ahead, there may be some.
"""

from __future__ import annotations

import bisect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers

from plait.errors import ConfigError, IncompatibleError
from plait.text.merges import Merges
from plait.text.tokenizer import Tokenizer

__all__ = ["ByteVocabulary", "completions", "split_dangling"]

Mask = npt.NDArray[np.bool_]
Ids = tuple[int, ...]
_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")
# What one cache of masks may take.
_CACHE_BYTES = 64 << 20


def split_dangling(data: bytes) -> tuple[str, bytes]:
    """The whole characters of some bytes, and the 0 to 3 bytes of a character that is not whole yet.

    Raises:
        ConfigError: the bytes cannot become UTF-8 whatever follows.
    """
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        tail = data[error.start :]
        if error.reason == "unexpected end of data" and completions(tail):
            return data[: error.start].decode(), tail
        raise ConfigError(
            f"Byte {error.start} of the text is not UTF-8 ({data[error.start : error.start + 4].hex(' ')}), and this "
            "model's tokenizer encodes only that. Cut the text at the end of a character, or inside one."
        ) from None


def completions(tail: bytes) -> list[range]:
    """The characters that a beginning of UTF-8 may become, as ranges of code points; empty if none."""
    if not tail:
        return []
    for length, lead, low, high in (
        (2, 0xC0, 0x80, 0x800),
        (3, 0xE0, 0x800, 0x10000),
        (4, 0xF0, 0x10000, 0x110000),
    ):
        mark = {2: 0xE0, 3: 0xF0, 4: 0xF8}[length]
        if tail[0] & mark != lead or len(tail) >= length or any(byte & 0xC0 != 0x80 for byte in tail[1:]):
            continue
        value = tail[0] & ~mark
        for byte in tail[1:]:
            value = value << 6 | byte & 0x3F
        missing = 6 * (length - len(tail))
        start, stop = max(value << missing, low), min((value + 1) << missing, high)
        parts = (range(start, min(stop, 0xD800)), range(max(start, 0xE000), stop))
        return [part for part in parts if part]
    return []


class ByteVocabulary(ABC):
    """The tokens of a byte-pair vocabulary as bytes, and the rules by which they follow each other.

    Made by `plait.text.byte_vocabulary`. Caches what it finds; use it from one thread at a time.

    Args:
        tokenizer: of the model.
        backend: the package's tokenizer without normalising, special tokens and truncation.
        description: what its JSON form says.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        end_ids: tokens that end a text.
        lead: bytes that the tokenizer puts before every text.
        longest: bytes of the longest token.
        lengths: bytes of each token, (V,) int64; 0 for a token that stands for no text.
    """

    lead: bytes = b""

    def __init__(
        self, tokenizer: Tokenizer, backend: tokenizers.Tokenizer, description: dict[str, Any]
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.end_ids = tokenizer.eos_ids
        self.backend = backend
        self.texts = [tokenizer.token_bytes(id) for id in range(self.vocab_size)]
        self.pieces = list(tokenizer.pieces)
        self.lengths = np.array([len(text) for text in self.texts], dtype=np.int64)
        self.longest = int(self.lengths.max())
        self._flat = np.frombuffer(b"".join(self.texts) + b"\0", dtype=np.uint8)
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        self._sorted = sorted((text, id) for id, text in enumerate(self.texts) if text)
        self._sorted_ids = np.array([id for _, id in self._sorted], dtype=np.int64)
        model = description["model"]
        self.ids_of_pieces: dict[str, int] = model["vocab"]
        self.ignores_merges = bool(model.get("ignore_merges"))
        self.added = {
            id: self.texts[id]
            for id in tokenizer.added_ids
            if id not in tokenizer.special_ids and self.texts[id]
        }
        self.added_mask = np.zeros(self.vocab_size, dtype=np.bool_)
        self.added_mask[list(self.added)] = True
        self._added_sorted = sorted(self.added.values())
        self._holds_added = self._tokens_that_hold_added()
        self.merges = Merges(self._rules(model["merges"]), self.letters, self.tokenise_pair, self.vocab_size)
        self._following: dict[int, Mask] = {}

    @abstractmethod
    def letters(self, token: int) -> list[int]:
        """The ids that merging starts from in a token's text; none where no text becomes the token."""

    @abstractmethod
    def encodings(self, data: bytes) -> list[Ids]:
        """The valid token sequences of some bytes, `lead` included: mostly one.

        Raises:
            ConfigError: the bytes are not UTF-8, or are not what the tokenizer makes tokens of.
        """

    @abstractmethod
    def may_end(self, ids: Sequence[int], data: bytes) -> bool:
        """Whether a text may end after a valid sequence with these bytes: it is then their encoding."""

    @abstractmethod
    def allowed(self, ids: Sequence[int], data: bytes) -> Mask:
        """Which tokens may follow, added tokens apart; see `successors`."""

    def successors(self, ids: Sequence[int], data: bytes) -> Mask:
        """Which tokens may follow a valid sequence, (V,) bool; never one that stands for no text.

        Args:
            ids: the sequence, without the tokens that start every text.
            data: its bytes.
        """
        mask = self.allowed(ids, data) & ~self._holds_added
        if self.added and not split_dangling(data)[1]:
            mask |= self.added_mask
            self._forbid_longer_added(ids, mask)
        return mask

    def bytes_at(self, tokens: npt.NDArray[np.int64], place: int) -> npt.NDArray[np.uint8]:
        """Byte number `place` of each token, which must be that long: (tokens,) uint8."""
        found: npt.NDArray[np.uint8] = self._flat[self._offsets[tokens] + place]
        return found

    def starting_with(self, prefix: bytes) -> npt.NDArray[np.int64]:
        """Ids of the tokens whose bytes start with a prefix of at least one byte."""
        low = bisect.bisect_left(self._sorted, (prefix, -1))
        head = prefix.rstrip(b"\xff")
        after = head[:-1] + bytes([head[-1] + 1]) if head else None
        high = len(self._sorted) if after is None else bisect.bisect_left(self._sorted, (after, -1))
        return self._sorted_ids[low:high]

    def may_follow(self, token: int) -> Mask:
        """Which tokens merging keeps apart from this one, (V,); kept for the tokens seen last."""
        return self.remember(self._following, token, lambda: self.merges.may_follow(token))

    def remember(self, cache: dict[_Key, _Value], key: _Key, find: Callable[[], _Value]) -> _Value:
        """What a cache holds for a key, or what `find` finds; the values used last are kept, of (V,) bytes each."""
        value = cache.pop(key) if key in cache else find()
        cache[key] = value
        if len(cache) > max(64, _CACHE_BYTES // self.vocab_size):
            del cache[next(iter(cache))]
        return value

    def tokenise_pair(self, left: int, right: int) -> list[int]:
        """What merging makes of two pieces in one word."""
        return [token.id for token in self.backend.model.tokenize(self.pieces[left] + self.pieces[right])]

    def encode(self, text: str) -> list[int]:
        """The ids of whole characters, without what starts a text."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def check_faithful(self, found: list[Ids], data: bytes) -> list[Ids]:
        """The encodings, if they stand for the bytes.

        Raises:
            ConfigError: they do not.
        """
        for ids in found:
            if b"".join([self.texts[id] for id in ids]) != data:
                raise ConfigError(
                    "This model's tokenizer changes the text (decoding does not give it back), so it has no exact "
                    "probability. Remove characters such as U+2581 that the vocabulary uses itself."
                )
        return found

    def _rules(self, merges: Sequence[Any]) -> list[tuple[int, int, int]]:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        ids = self.ids_of_pieces
        return [(ids[left], ids[right], ids[left + right]) for left, right in pairs]

    def _tokens_that_hold_added(self) -> Mask:
        """Tokens whose text would be cut, because an added token stands inside it."""
        mask = np.zeros(self.vocab_size, dtype=np.bool_)
        if not self.added:
            return mask
        firsts = {text[0] for text in self.added.values()}
        for id, text in enumerate(self.texts):
            if id not in self.added and not firsts.isdisjoint(text):
                mask[id] = any(added in text for added in self._added_sorted if added[0] in text)
        return mask

    def _forbid_longer_added(self, ids: Sequence[int], mask: Mask) -> None:
        """Forbid tokens with which an added token that starts before them would be found.

        Added tokens are looked for from left to right, the longest at each place, and not inside each other.
        """
        longest = max(map(len, self._added_sorted))
        tail = b""
        for id in reversed(ids):
            text = self.texts[id]
            tail = text + tail
            starts = [0] if id in self.added else range(len(text))
            for start in starts:
                begun = tail[start:]
                if len(begun) >= longest:
                    continue
                place = bisect.bisect_right(self._added_sorted, begun)
                while place < len(self._added_sorted) and self._added_sorted[place].startswith(begun):
                    mask[self.starting_with(self._added_sorted[place][len(begun) :])] = False
                    place += 1
            if len(tail) >= longest:
                return


def plain_backend(tokenizer: Tokenizer) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A copy of the package's tokenizer to which special tokens are text like any other, and its description.

    Raises:
        IncompatibleError: it is no byte-pair vocabulary, or added tokens swallow what stands around them.
    """
    source = tokenizer.package_tokenizer
    description: dict[str, Any] = json.loads(source.to_str())
    kind = description["model"].get("type")
    if kind != "BPE" or description["model"].get("dropout"):
        raise IncompatibleError(
            f"Exact bytes need a byte-pair vocabulary, whose encodings can be continued. This model's is {kind}."
        )
    backend = tokenizers.Tokenizer(source.model)
    added = [
        token for id, token in sorted(source.get_added_tokens_decoder().items()) if id in tokenizer.added_ids
    ]
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        raise IncompatibleError(
            "This model's added tokens depend on what stands around them. Exact bytes do not."
        )
    backend.add_tokens(added)
    return backend, description
