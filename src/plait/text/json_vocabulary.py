"""The tokenizer that a Hugging Face tokenizer.json describes, with the facts kept beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers.decoders import Decoder
from tokenizers.processors import PostProcessor

from plait.errors import ModelFileError
from plait.text.backend import read_backend
from plait.text.vocabulary import (
    END_OF_TURN,
    MAX_TOKENS,
    SPACE_MARK,
    TokenizerParts,
    Vocabulary,
    spell_byte_level,
    spell_sentencepiece,
    spell_word,
    spell_wordpiece,
)

__all__ = ["read_json", "read_json_tokenizer", "read_text"]

_MAX_BYTES = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 256 MiB.

    Raises:
        ModelFileError: the file is missing, unreadable, too large, or not a JSON object.
    """
    return _parsed(read_text(path), path.name)


def read_json_tokenizer(
    source: str | Path, config: Mapping[str, Any] | None, generation_config: Mapping[str, Any] | None
) -> TokenizerParts:
    """Build the tokenizer of a tokenizer.json.

    Args:
        source: the JSON text, or the path of the file or of its folder.
        config: what tokenizer_config.json holds; read from the same folder if None.
        generation_config: what generation_config.json holds; read from the same folder if None.

    Raises:
        ModelFileError: a file is damaged, or holds a tokenizer of an unknown kind.
    """
    if isinstance(source, str) and source.lstrip().startswith("{"):
        text, name = source, "tokenizer.json"
    else:
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        text, name = read_text(path), path.name
        config = _beside(path, "tokenizer_config.json") if config is None else config
        if generation_config is None:
            generation_config = _beside(path, "generation_config.json")
    return _JSONTokenizer(text, name, config or {}, generation_config or {}).parts()


class _JSONTokenizer:
    """One reading of the files."""

    def __init__(
        self, text: str, name: str, config: Mapping[str, Any], generation_config: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.config = config
        self.generation_config = generation_config
        self.description = _parsed(text, name)
        self.backend = read_backend(text, name)
        self.pieces = {id: piece for piece, id in self.backend.get_vocab(with_added_tokens=True).items()}
        self.added = self.backend.get_added_tokens_decoder()
        self._check_ids()

    def parts(self) -> TokenizerParts:
        kind = str(self.description["model"].get("type", "unnamed model"))
        bos, eos = self._configured_ids("bos_token"), self._configured_ids("eos_token")
        special = {id for id, token in self.added.items() if token.special}
        ends = [id for id in special if self.added[id].content in END_OF_TURN]
        prefix, suffix = self._frame()
        if "add_bos_token" in self.config:
            prefix = tuple(bos[:1]) if self.config["add_bos_token"] else ()
        if "add_eos_token" in self.config:
            suffix = tuple(eos[:1]) if self.config["add_eos_token"] else ()
        return TokenizerParts(
            name=f"{kind} ({self.name})",
            backend=self.backend,
            vocabulary=self._vocabulary(special),
            bos_id=next(iter(bos), None),
            eos_ids=frozenset([*eos, *ends]),
            prefix=prefix,
            suffix=suffix,
        )

    def _vocabulary(self, special: set[int]) -> Vocabulary:
        pieces = [self.pieces.get(id, "") for id in range(max(self.pieces) + 1)]
        unused = {id for id, piece in enumerate(pieces) if not piece}
        spell, strips = self._spelling()
        added = frozenset(self.added.keys() - special)
        return Vocabulary(pieces, frozenset(special | unused), added, spell, strips)

    def _check_ids(self) -> None:
        highest = max(self.pieces, default=-1)
        if not 0 <= highest < MAX_TOKENS:
            raise self._damaged(f"its highest id is {highest}, outside [0, {MAX_TOKENS})")
        # The package numbers added tokens itself and does not look at the ids in the file.
        for token in self.description.get("added_tokens") or []:
            given, used = token["id"], self.backend.token_to_id(token["content"])
            if given != used:
                raise self._damaged(f"its added token {token['content']!r} has id {given} instead of {used}")

    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor puts before and after a text.

        Read from its description: run, it would end in a panic where it names a token without an id.
        """
        before: list[int] = []
        after: list[int] = []
        for step in _steps(self.backend.post_processor, "processors"):
            if step["type"] == "TemplateProcessing":
                side = before
                for piece in step["single"]:
                    if "SpecialToken" in piece:
                        side += self._template_ids(step, piece["SpecialToken"]["id"])
                    else:
                        side = after
            elif step["type"] in ("BertProcessing", "RobertaProcessing"):
                before.append(step["cls"][1])
                after.append(step["sep"][1])
        for id in [*before, *after]:
            if id not in self.pieces:
                raise self._damaged(f"its post-processor puts in the id {id}, which is no token")
        return tuple(before), tuple(after)

    def _template_ids(self, step: dict[str, Any], name: str) -> list[int]:
        if name not in step["special_tokens"]:
            raise self._damaged(f"its post-processor names no id for {name!r}")
        return list(step["special_tokens"][name]["ids"])

    def _configured_ids(self, key: str) -> list[int]:
        """The ids of `bos_token` or `eos_token` in both configurations, tokenizer_config.json first."""
        ids = []
        token = self.config.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token is not None:
            id = self.backend.token_to_id(token) if isinstance(token, str) else None
            if id is None:
                raise ModelFileError(f"tokenizer_config.json: {key} {token!r} is not a token of {self.name}.")
            ids.append(id)
        given = self.generation_config.get(f"{key}_id")
        for id in given if isinstance(given, list) else [] if given is None else [given]:
            if not isinstance(id, int) or id not in self.pieces:
                raise ModelFileError(f"generation_config.json: {key}_id {id!r} is not an id of {self.name}.")
            ids.append(id)
        return ids

    def _spelling(self) -> tuple[Callable[[str], bytes], bool]:
        """How pieces spell bytes, and whether a leading space is dropped, from the `decoder`."""
        steps = _steps(self.backend.decoder, "decoders")
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return spell_byte_level, False
        if not kinds:
            return spell_word, True
        if kinds == ["WordPiece"] and steps[0]["prefix"] == "##":
            return spell_wordpiece, True
        if kinds == ["Metaspace"] and steps[0]["replacement"] == SPACE_MARK:
            return spell_sentencepiece, steps[0]["prepend_scheme"] != "never"
        if "Replace" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
            replace = steps[kinds.index("Replace")]
            if replace["pattern"] == {"String": SPACE_MARK} and replace["content"] == " ":
                return spell_sentencepiece, "Strip" in kinds
        raise ModelFileError(
            f"{self.name}: the decoder {' + '.join(kinds)} is not known. Known: ByteLevel,"
            " WordPiece, Metaspace, and SentencePiece's Replace + ByteFallback + Fuse + Strip."
        )

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.name}: {what}. The file is damaged; download it again.")


def _steps(part: Decoder | PostProcessor | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a part, as the package understood them: every field is there."""
    return [] if part is None else _flat(json.loads(part.__getstate__()), inner)


def _flat(description: dict[str, Any], inner: str) -> list[dict[str, Any]]:
    if description["type"] != "Sequence":
        return [description]
    return [step for part in description[inner] for step in _flat(part, inner)]


def _beside(path: Path, name: str) -> dict[str, Any] | None:
    sibling = path.parent / name
    return read_json(sibling) if sibling.is_file() else None


def read_text(path: Path) -> str:
    """The contents of a bounded UTF-8 file.

    Raises:
        ModelFileError: it cannot be read, or is too long to belong to a tokenizer.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ModelFileError(f"{path} has more than {_MAX_BYTES >> 20} MiB. It is not a tokenizer.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}. Give the path of a tokenizer.json.") from error


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{name} is not JSON: {error}. The file is damaged; download it again."
        ) from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{name} holds a JSON {type(value).__name__} instead of an object.")
    return value
