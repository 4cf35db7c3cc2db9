"""What each token of a vocabulary stands for, as bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import tokenizers

from plait.text.spaces import SpacePrefix

__all__ = [
    "END_OF_TURN",
    "MAX_TOKENS",
    "SPACE_MARK",
    "TokenizerParts",
    "Vocabulary",
    "byte_level_alphabet",
    "spell_byte_level",
    "spell_sentencepiece",
    "spell_word",
    "spell_wordpiece",
]

# A model file may name no id above this; the largest published vocabularies have about 2^18 tokens.
MAX_TOKENS = 1 << 22

# SentencePiece writes a space as U+2581.
SPACE_MARK = "\u2581"

# Control tokens that end an assistant's turn, or the whole text, whatever the file calls its EOS.
END_OF_TURN = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<turn|>",
        "<end_of_utterance>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """The characters by which GPT-2 (Radford et al. 2019, encoder.py) writes the 256 bytes.

    Printable Latin-1 characters stand for their own byte; the other bytes, in order, are written as
    U+0100, U+0101, ... .
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Mapping[str, int] = byte_level_alphabet()


def spell_byte_level(piece: str) -> bytes:
    """The bytes of a piece of a byte-level vocabulary.

    A piece with a character outside the alphabet stands for its own text.
    """
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:
        return piece.encode()


def spell_sentencepiece(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: `"\u2581the"` is ` the`, `"<0x0A>"` is one byte."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()


def spell_wordpiece(piece: str) -> bytes:
    """The bytes of a WordPiece piece: `"##ing"` continues a word, any other piece starts one."""
    return (piece[2:] if piece.startswith("##") else " " + piece).encode()


def spell_word(piece: str) -> bytes:
    """The bytes of a piece that is a whole word."""
    return (" " + piece).encode()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model, by id.

    Args:
        pieces: each token as the model file writes it; an unused id has an empty piece.
        special: ids of control, unknown and unused tokens. They stand for no text.
        added: ids of other tokens that are matched whole in text and stand for themselves.
        spell: the bytes of every other piece.
        strips_leading_space: whether a space at the very start was put there by `encode`, so that
            `decode` takes it away.
    """

    pieces: Sequence[str]
    special: frozenset[int]
    added: frozenset[int]
    spell: Callable[[str], bytes]
    strips_leading_space: bool

    def token_bytes(self, id: int, *, skip_special: bool = True) -> bytes:
        """The bytes of one token; a special one has none, or its name unless `skip_special`."""
        piece = self.pieces[id]
        if id in self.special:
            return b"" if skip_special else piece.encode()
        if id in self.added:
            is_sentencepiece = self.spell is spell_sentencepiece
            return (piece.replace(SPACE_MARK, " ") if is_sentencepiece else piece).encode()
        return self.spell(piece)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What a model file says about its tokenizer.

    Args:
        name: what kind of tokenizer it is, for people.
        backend: turns text into ids; adds nothing, cuts nothing off.
        vocabulary: what the ids stand for.
        bos_id: the token that starts a text, or None.
        eos_ids: tokens that end a text or a turn.
        prefix: ids put before a text that is encoded with `add_special`.
        suffix: ids put after it.
        space_prefix: puts spaces before text, where the vocabulary expects them.
    """

    name: str
    backend: tokenizers.Tokenizer
    vocabulary: Vocabulary
    bos_id: int | None
    eos_ids: frozenset[int]
    prefix: tuple[int, ...] = field(default=())
    suffix: tuple[int, ...] = field(default=())
    space_prefix: SpacePrefix | None = None
