"""SentencePiece byte-pair vocabularies seen from bytes: one long word, spaces marked, unknown characters as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers

from plait.errors import IncompatibleError
from plait.text.byte_vocabulary import ByteVocabulary, Ids, Mask, completions, split_dangling
from plait.text.tokenizer import Tokenizer
from plait.text.vocabulary import SPACE_MARK

__all__ = ["SentencePieceBytes"]

# Blocks of characters above this size are taken to hold one that the vocabulary lacks.
_LARGEST_BLOCK = 4096


class SentencePieceBytes(ByteVocabulary):
    """Pieces over characters; a character that is no piece is written as byte tokens, which never merge.

    Raises:
        IncompatibleError: the tokenizer normalises text in another way, or cuts it into words.
    """

    def __init__(
        self, tokenizer: Tokenizer, backend: tokenizers.Tokenizer, description: dict[str, Any]
    ) -> None:
        backend.normalizer = normalizers.Replace(" ", SPACE_MARK)
        self._read_lead(tokenizer, description)
        self._byte_ids: dict[int, int] = {}
        for byte in range(256):
            id = tokenizer.id_of(f"<0x{byte:02X}>")
            if id is None:
                raise IncompatibleError(f"This model's vocabulary has no token for byte {byte:#04x}.")
            self._byte_ids[byte] = id
        self._bytes_at = {id: byte for byte, id in self._byte_ids.items()}
        self._byte_masks: dict[bytes, Mask] = {}
        super().__init__(tokenizer, backend, description)

    def _read_lead(self, tokenizer: Tokenizer, description: dict[str, Any]) -> None:
        """Whether a space is put before text; see `ByteVocabulary.lead`."""
        normalizer = description.get("normalizer") or {"type": "Sequence", "normalizers": []}
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        cut = description.get("pre_tokenizer")
        prepends = tokenizer.strips_leading_space
        for step in steps:
            if step["type"] == "Prepend" and step["prepend"] == SPACE_MARK:
                prepends = True
            elif not (
                step["type"] == "Replace"
                and step["pattern"] == {"String": " "}
                and step["content"] == SPACE_MARK
            ):
                raise IncompatibleError(
                    f"This model's tokenizer changes text ({step['type']}), so bytes have no exact probability."
                )
        if cut is not None:
            # A cut at spaces finds none once they are marked.
            is_idle = cut["type"] == "Split" and cut["pattern"] == {"String": " "} and steps
            is_mark = cut["type"] == "Metaspace" and not cut.get("split", True)
            if not is_idle and not is_mark:
                raise IncompatibleError(
                    f"This model's tokenizer cuts marked text into words ({cut['type']}), which exact bytes cannot do."
                )
        self.lead = b" " if prepends else b""

    def letters(self, token: int) -> list[int]:
        if token in self._bytes_at or not self.texts[token] or token in self.added:
            return []
        ids = [self.ids_of_pieces.get(character, -1) for character in self.pieces[token]]
        return [] if -1 in ids else ids

    def encodings(self, data: bytes) -> list[Ids]:
        text, tail = split_dangling(data)
        found = (*self.encode(text), *(self._byte_ids[byte] for byte in tail))
        return self.check_faithful([found], data)

    def may_end(self, ids: Sequence[int], data: bytes) -> bool:
        return not split_dangling(_last_character(data))[1]

    def allowed(self, ids: Sequence[int], data: bytes) -> Mask:
        _, tail = split_dangling(_last_character(data))
        if tail:
            return self._byte_tokens(tail)
        last = ids[-1] if ids else None
        if last is None or last in self.added or last in self._bytes_at:
            mask = self.merges.reachable
        else:
            mask = self.may_follow(last)
        return mask | self._byte_tokens(b"")

    def _byte_tokens(self, tail: bytes) -> Mask:
        """Byte tokens that may follow the beginning of a character: it must have no piece in the end."""
        return self.remember(self._byte_masks, tail, lambda: self._read_byte_tokens(tail))

    def _read_byte_tokens(self, tail: bytes) -> Mask:
        mask = np.zeros(self.vocab_size, dtype=np.bool_)
        for byte, id in self._byte_ids.items():
            try:
                text, rest = split_dangling(tail + bytes([byte]))
            except ValueError:
                continue
            mask[id] = self._may_lack(rest) if rest else self._lacks(text)
        return mask

    def _lacks(self, character: str) -> bool:
        return character.replace(" ", SPACE_MARK) not in self.ids_of_pieces

    def _may_lack(self, begun: bytes) -> bool:
        parts = completions(begun)
        return sum(map(len, parts)) > _LARGEST_BLOCK or any(
            self._lacks(chr(c)) for part in parts for c in part
        )


def _last_character(data: bytes) -> bytes:
    """The bytes from the start of the last character on, whole or not."""
    start = max(len(data) - 1, 0)
    while start > 0 and data[start] & 0xC0 == 0x80:
        start -= 1
    return data[start:]
