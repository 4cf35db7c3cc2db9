"""Text to token ids and back."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders

from plait.errors import ConfigError
from plait.files import write_text
from plait.text.backend import Backend
from plait.text.gguf_vocabulary import read_gguf_tokenizer
from plait.text.json_vocabulary import read_json_tokenizer
from plait.text.vocabulary import TokenizerParts, spell_byte_level

__all__ = ["Tokenizer"]


class Tokenizer:
    """Turns text into the token ids of one model, and ids back into text.

    Made by `from_gguf` or `from_json`; never changes, and may be used from many threads.

    `decode` joins the bytes of the tokens and reads them as UTF-8, so text comes back exactly where
    the vocabulary spells every byte; bytes that are not UTF-8 become U+FFFD. SentencePiece's rule
    that a text starts with a space is undone at the start of the decoded text.

    Attributes:
        name: what kind of tokenizer it is.
        vocab_size: number of ids; every id is in [0, vocab_size).
        bos_id: the token that starts a text, or None.
        eos_ids: tokens that end a text or a turn: EOS and, by name, tokens such as `<|im_end|>`.
        special_ids: control, unknown and unused tokens; they stand for no text.
        strips_leading_space: whether `decode` drops one space at the start of a text.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    special_ids: frozenset[int]
    strips_leading_space: bool

    def __init__(self, parts: TokenizerParts) -> None:
        self.name = parts.name
        self.vocab_size = len(parts.vocabulary.pieces)
        self.bos_id = parts.bos_id
        self.eos_ids = parts.eos_ids
        self.special_ids = parts.vocabulary.special
        self.strips_leading_space = parts.vocabulary.strips_leading_space
        self._vocabulary = parts.vocabulary
        self._prefix, self._suffix = parts.prefix, parts.suffix
        self._space_prefix = parts.space_prefix
        self._backend = Backend(parts.backend)
        self._source = parts.backend

    @property
    def pieces(self) -> Sequence[str]:
        """Each token as the model file writes it, by id."""
        return self._vocabulary.pieces

    @property
    def added_ids(self) -> frozenset[int]:
        """Tokens that are matched whole in text and stand for themselves."""
        return self._vocabulary.added

    @property
    def start_ids(self) -> tuple[int, ...]:
        """The tokens that `encode` puts before a text with `add_special`."""
        return self._prefix

    @property
    def package_tokenizer(self) -> tokenizers.Tokenizer:
        """The `tokenizers` package's own object, to be read and not changed."""
        return self._backend.plain

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The tokenizer described by the metadata of a GGUF file.

        Kinds `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE with byte fallback) are read.
        Where the file asks for a space before text (`add_space_prefix`), every stretch of text
        before, between and after special tokens gets one.

        Raises:
            ModelFileError: the metadata is incomplete or inconsistent, or names an unknown kind of
                tokenizer or pre-tokenizer.
        """
        return cls(read_gguf_tokenizer(metadata))

    @classmethod
    def from_json(
        cls,
        source: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> Self:
        """The tokenizer described by a Hugging Face tokenizer.json.

        Args:
            source: the JSON text, or the path of the file or of its folder.
            config: the contents of tokenizer_config.json: `bos_token`, `eos_token`, `add_bos_token`,
                `add_eos_token`. Read from the same folder if it is there and None is given.
            generation_config: the contents of generation_config.json: `eos_token_id`, one or several,
                and `bos_token_id`. Likewise.

        Raises:
            ModelFileError: a file is damaged, or describes a tokenizer of an unknown kind.
        """
        return cls(read_json_tokenizer(source, config, generation_config))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and beside it tokenizer_config.json and generation_config.json.

        Raises:
            ConfigError: the vocabulary is not byte-level, the only kind that is written.
        """
        if self._vocabulary.spell is not spell_byte_level:
            raise ConfigError(f"Only byte-level vocabularies are written. Got {self.name}.")
        copy = tokenizers.Tokenizer.from_str(self._source.to_str())
        copy.decoder = decoders.ByteLevel()
        ends = sorted(self.eos_ids)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self.bos_id is not None:
            config["bos_token"] = self._vocabulary.pieces[self.bos_id]
        if ends:
            config["eos_token"] = self._vocabulary.pieces[ends[0]]
        if self._prefix or self._suffix:
            config |= {"add_bos_token": bool(self._prefix), "add_eos_token": bool(self._suffix)}
        write_text(folder / "tokenizer.json", copy.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        write_text(folder / "generation_config.json", json.dumps({"eos_token_id": ends}, indent=2) + "\n")

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            add_special: put the tokens around the text that the model expects, such as BOS.
            parse_special: read the names of special tokens in the text as those tokens. Text from
                outside must not be parsed: it could end its own turn.

        Raises:
            ConfigError: `text` is not text, or holds half of a surrogate pair.
            ModelFileError: the model's tokenizer is damaged in a way that only shows now.
        """
        return self.encode_batch([text], add_special=add_special, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """The ids of many texts, using all cores. Same arguments and errors as `encode`."""
        _check_text(texts)
        if self._space_prefix is not None:
            texts = [self._space_prefix.apply(text, parse_special=parse_special) for text in texts]
        batch = self._backend.encode_batch(texts, parse_special=parse_special)
        return [[*self._prefix, *ids, *self._suffix] for ids in batch] if add_special else batch

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """The text of a sequence of ids.

        Args:
            skip_special: leave special tokens out; otherwise their names are shown.
            continues: the ids follow earlier text, so a space at their start is kept.

        Raises:
            ConfigError: an id is outside [0, vocab_size).
        """
        data = b"".join([self.shown_bytes(id, skip_special=skip_special) for id in ids])
        if self.strips_leading_space and not continues:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; none for a special token.

        Raises:
            ConfigError: the id is outside [0, vocab_size).
        """
        return self.shown_bytes(id)

    def shown_bytes(self, id: int, *, skip_special: bool = True) -> bytes:
        """What a token adds to decoded text: its bytes, or the name of a special one if it is shown.

        Raises:
            ConfigError: the id is outside [0, vocab_size).
        """
        id = operator.index(id)
        if not 0 <= id < self.vocab_size:
            raise ConfigError(f"Token id {id} is outside the vocabulary of {self.vocab_size} tokens.")
        return self._vocabulary.token_bytes(id, skip_special=skip_special)

    def id_of(self, token: str) -> int | None:
        """The id of a token as the model file writes it, such as `"<|im_end|>"`; None if there is none."""
        return self._backend.id_of(token)

    def has_ids_of(self, other: Tokenizer) -> bool:
        """Whether both give every id that they share to the same token; one may have more ids."""
        count = min(self.vocab_size, other.vocab_size)
        return list(self._vocabulary.pieces[:count]) == list(other._vocabulary.pieces[:count])

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name}, {self.vocab_size} tokens>"


def _check_text(texts: Sequence[Any]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError("Only text can be encoded, and encode_batch takes a list of texts.")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"Character {error.start} of the text is half of a surrogate pair, which is no text in"
                " Unicode. Decode the text from its source with errors='replace'."
            ) from None
