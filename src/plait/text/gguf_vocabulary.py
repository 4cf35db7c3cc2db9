"""The tokenizer that a GGUF file describes in its metadata.

The keys are those of the GGUF specification (ggml/docs/gguf.md, "Tokenizer"); what a missing key
means is taken from llama.cpp, which wrote the files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers

from plait.errors import ModelFileError, suggestion
from plait.text.pretokenizers import PRE_TOKENIZERS
from plait.text.spaces import SpacePrefix
from plait.text.vocabulary import (
    END_OF_TURN,
    MAX_TOKENS,
    SPACE_MARK,
    TokenizerParts,
    Vocabulary,
    spell_byte_level,
    spell_sentencepiece,
)

__all__ = ["gguf_special_pieces", "read_gguf_tokenizer"]

# SentencePiece allows pieces of at most 512 characters, and trains on 16 unless told otherwise.
_MAX_PIECE = 512
# Ways to cut all pieces in two; the largest published vocabulary has 1.7 million.
_MAX_CUTS = 1 << 23


class _Kind(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> TokenizerParts:
    """Build the tokenizer of a GGUF file.

    Args:
        metadata: the file's metadata: text as str, arrays as lists or numpy arrays.

    Raises:
        ModelFileError: a key is missing, of the wrong type or inconsistent, or the kind of tokenizer
            or of pre-tokenizer is not known.
    """
    return _GGUFTokenizer(metadata).parts()


def gguf_special_pieces(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The text of the BOS, EOS, unknown and padding tokens, as chat templates name them.

    Raises:
        ModelFileError: an id is outside the vocabulary, or there is no vocabulary.
    """
    keys = _Keys(metadata)
    pieces = keys.strings("tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: keys.id(f"{key}_token_id", len(pieces)) for name, key in names.items()}
    return {name: pieces[id] for name, id in ids.items() if id is not None}


class _Keys:
    """Typed reading of the keys under `tokenizer.ggml.`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise _wrong_type(key, "text", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise _wrong_type(key, "true or false", value)
        return value

    def id(self, key: str, vocab_size: int) -> int | None:
        value = self._metadata.get(_full(key))
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong_type(key, "a whole number", value)
        if not 0 <= value < vocab_size:
            raise _damaged(f"{_full(key)} is {value} but the vocabulary has {vocab_size} tokens")
        return value

    def strings(self, key: str) -> list[str]:
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise _damaged(f"{_full(key)} must be a list of text")
        try:
            "".join(values).encode()
        except UnicodeEncodeError:
            raise _damaged(f"{_full(key)} holds bytes that are not UTF-8") from None
        return values

    def numbers(self, key: str, length: int, default: float | None = None) -> list[float]:
        if default is not None and _full(key) not in self._metadata:
            return [default] * length
        values = self._list(key)
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise _damaged(f"{_full(key)} must be a list of finite numbers")
        if len(values) != length:
            raise _damaged(f"{_full(key)} has {len(values)} entries for {length} tokens")
        return values

    def _list(self, key: str) -> list[Any]:
        values = self._value(key)
        # numpy arrays, which readers may return, are turned into Python's own numbers.
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise _wrong_type(key, "a list", values)
        return list(values)

    def _value(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(_full(key), default)
        if value is None:
            raise ModelFileError(f"The GGUF metadata has no {_full(key)}. The file has no tokenizer.")
        return value


class _GGUFTokenizer:
    """One reading of the metadata."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.keys = _Keys(metadata)
        self.model = self.keys.text("model")
        builders = {"gpt2": self._byte_level, "llama": self._sentencepiece}
        if self.model not in builders:
            raise ModelFileError(
                f"The GGUF file has a tokenizer of kind {self.model!r}, which is not known."
                f" Known: {', '.join(builders)}."
            )
        self._build = builders[self.model]
        self.pieces = self.keys.strings("tokens")
        size = len(self.pieces)
        if not 0 < size <= MAX_TOKENS:
            raise _damaged(f"tokenizer.ggml.tokens has {size} tokens, outside [1, {MAX_TOKENS}]")
        self.kinds = self.keys.numbers("token_type", size, default=_Kind.NORMAL)
        self._name_empty_pieces()

    def parts(self) -> TokenizerParts:
        return self._build()

    def _byte_level(self) -> TokenizerParts:
        name = self._pre_tokenizer_name()
        known = PRE_TOKENIZERS.get(name)
        if known is None:
            raise ModelFileError(
                f"The GGUF file cuts text into words by {name!r} (tokenizer.ggml.pre), which is not"
                f" known.{suggestion(name, PRE_TOKENIZERS)} Known: {', '.join(sorted(PRE_TOKENIZERS))}."
            )
        ids = self._ids()
        model = models.BPE(ids, self._listed_merges(ids), ignore_merges=known.ignores_merges)
        backend = Tokenizer(model)
        backend.pre_tokenizer = known.cut()
        if known.composes:
            backend.normalizer = normalizers.NFC()
        return self._assembled(
            f"byte-level BPE ({name})",
            backend,
            Vocabulary(self.pieces, self._special(), self._user_defined(), spell_byte_level, False),
            adds_bos=known.adds_bos,
        )

    def _sentencepiece(self) -> TokenizerParts:
        # Files write the spaces of user-defined pieces either way.
        for id in self._user_defined():
            self.pieces[id] = self.pieces[id].replace(SPACE_MARK, " ")
        adds_space = self.keys.flag("add_space_prefix", default=True)
        unknown = self.keys.id("unknown_token_id", len(self.pieces))
        backend = Tokenizer(
            models.BPE(
                self._ids(),
                self._scored_merges(),
                unk_token=None if unknown is None else self.pieces[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        backend.normalizer = normalizers.Replace(" ", SPACE_MARK)
        return self._assembled(
            "SentencePiece BPE",
            backend,
            Vocabulary(self.pieces, self._special(), self._user_defined(), spell_sentencepiece, adds_space),
            adds_bos=True,
            space_prefix=self._space_prefix() if adds_space else None,
        )

    def _assembled(
        self,
        name: str,
        backend: Tokenizer,
        vocabulary: Vocabulary,
        *,
        adds_bos: bool,
        space_prefix: SpacePrefix | None = None,
    ) -> TokenizerParts:
        control = self._of_kind(_Kind.CONTROL, _Kind.UNKNOWN)
        # Control tokens are looked for in the text as it is given, user-defined ones in normal form:
        # SentencePiece marks spaces first.
        names = [AddedToken(self.pieces[id], special=True, normalized=False) for id in control]
        backend.add_special_tokens(names)
        user_defined = sorted(vocabulary.added)
        backend.add_tokens([AddedToken(self.pieces[id], normalized=True) for id in user_defined])

        size = len(self.pieces)
        bos, eos = (self.keys.id(f"{name}_token_id", size) for name in ("bos", "eos"))
        ends = [eos, *(self.keys.id(f"{name}_token_id", size) for name in ("eot", "eom"))]
        ends += [id for id in control if self.pieces[id] in END_OF_TURN]
        adds_bos = self.keys.flag("add_bos_token", adds_bos)
        adds_eos = self.keys.flag("add_eos_token", default=False)
        return TokenizerParts(
            name=name,
            backend=backend,
            vocabulary=vocabulary,
            bos_id=bos,
            eos_ids=frozenset(id for id in ends if id is not None),
            prefix=(bos,) if adds_bos and bos is not None else (),
            suffix=(eos,) if adds_eos and eos is not None else (),
            space_prefix=space_prefix,
        )

    def _pre_tokenizer_name(self) -> str:
        name = self.keys.text("pre", default="")
        if not name:
            warnings.warn(
                "The GGUF file does not say how text is cut into words (tokenizer.ggml.pre)."
                " The default is used; if the model was trained with another cut, its answers get worse.",
                stacklevel=6,
            )
        return name or "default"

    def _name_empty_pieces(self) -> None:
        """Give unused ids, which some files leave empty, a piece that no text contains."""
        for id, piece in enumerate(self.pieces):
            if not piece:
                self.pieces[id], self.kinds[id] = f"[EMPTY_{id}]", _Kind.UNUSED

    def _ids(self) -> dict[str, int]:
        ids = {piece: id for id, piece in enumerate(self.pieces)}
        if len(ids) != len(self.pieces):
            id, piece = next((id, piece) for id, piece in enumerate(self.pieces) if ids[piece] != id)
            raise _damaged(f"the token {piece!r} has two ids, {id} and {ids[piece]}")
        return ids

    def _of_kind(self, *kinds: _Kind) -> list[int]:
        return [id for id, kind in enumerate(self.kinds) if kind in kinds]

    def _special(self) -> frozenset[int]:
        return frozenset(self._of_kind(_Kind.CONTROL, _Kind.UNKNOWN, _Kind.UNUSED))

    def _user_defined(self) -> frozenset[int]:
        return frozenset(self._of_kind(_Kind.USER_DEFINED))

    def _space_prefix(self) -> SpacePrefix:
        names = [self.pieces[id] for id in self._of_kind(_Kind.CONTROL, _Kind.UNKNOWN)]
        # GGUF has no place for Phi-3's rule that most of its special tokens swallow the white space
        # after them (`rstrip` in its tokenizer.json).
        is_phi3 = self.metadata.get("general.architecture") == "phi3"
        return SpacePrefix(names, set(names) - {"<unk>", "<s>", "<|endoftext|>"} if is_phi3 else ())

    def _listed_merges(self, ids: Mapping[str, int]) -> list[tuple[str, str]]:
        merges = []
        for merge in self.keys.strings("merges"):
            left, _, right = merge.partition(" ")
            if left not in ids or right not in ids or left + right not in ids:
                raise _damaged(f"the merge {merge!r} does not join two tokens into a third")
            merges.append((left, right))
        return merges

    def _scored_merges(self) -> list[tuple[str, str]]:
        """Every way to join two pieces into a third, from the best score of the result to the worst.

        SentencePiece's BPE joins the neighbours whose union has the highest score, again and again
        (Kudo and Richardson 2018); as a list of merges in that order, that is ordinary BPE.
        """
        scores = self.keys.numbers("scores", len(self.pieces))
        normal = [id for id, kind in enumerate(self.kinds) if kind == _Kind.NORMAL]
        longest = max((len(self.pieces[id]) for id in normal), default=0)
        if longest > _MAX_PIECE:
            raise _damaged(f"a piece has {longest} characters, above {_MAX_PIECE}")
        num_cuts = sum(len(self.pieces[id]) for id in normal)
        if num_cuts > _MAX_CUTS:
            raise _damaged(f"the pieces have {num_cuts} characters together, above {_MAX_CUTS}")
        known = {self.pieces[id] for id in normal}
        normal.sort(key=lambda id: -scores[id])
        return [
            (piece[:cut], piece[cut:])
            for piece in (self.pieces[id] for id in normal)
            for cut in range(1, len(piece))
            if piece[:cut] in known and piece[cut:] in known
        ]


def _full(key: str) -> str:
    return f"tokenizer.ggml.{key}"


def _wrong_type(key: str, allowed: str, value: Any) -> ModelFileError:
    return _damaged(f"{_full(key)} must be {allowed}, and holds {type(value).__name__}")


def _damaged(what: str) -> ModelFileError:
    return ModelFileError(f"GGUF metadata: {what}. The file is damaged or hostile; download it again.")
