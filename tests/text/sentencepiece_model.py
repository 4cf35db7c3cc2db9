"""SentencePiece's own tokenizer, made from the same metadata as ours."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from sentencepiece import SentencePieceProcessor

__all__ = ["sentencepiece_of"]

_UNKNOWN = 2


def sentencepiece_of(metadata: Mapping[str, Any]) -> SentencePieceProcessor:
    """Load the vocabulary of a GGUF file as a SentencePiece model.

    The model is a protocol buffer (sentencepiece_model.proto); its few fields are written by hand.
    """
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    unknown = ggml["unknown_token_id"]
    pieces = []
    for id, (piece, score, kind) in enumerate(
        zip(ggml["tokens"], ggml["scores"], ggml["token_type"], strict=True)
    ):
        piece = piece.replace(" ", "\u2581") if kind == 4 else piece
        kind = _UNKNOWN if id == unknown else int(kind)
        pieces.append(_field(1, _field(1, piece.encode()) + _field(2, float(score)) + _field(3, kind)))
    trainer = _field(3, 2) + _field(35, True)
    for field, name in ((40, "unknown"), (41, "bos"), (42, "eos")):
        id = ggml[f"{name}_token_id"]
        trainer += _field(field, id) + _field(field + 5, ggml["tokens"][id].encode())
    trainer += _field(43, -1)
    spaces = _field(3, bool(ggml["add_space_prefix"])) + _field(4, False) + _field(5, True)
    normalizer = _field(1, b"identity") + spaces
    return SentencePieceProcessor(model_proto=b"".join(pieces) + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, value: bytes | float | int) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value % (1 << 64))


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
