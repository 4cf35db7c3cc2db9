"""From a tokenizer to its byte vocabulary."""

from __future__ import annotations

from plait.text.byte_level import ByteLevelBytes
from plait.text.byte_vocabulary import ByteVocabulary, plain_backend
from plait.text.sentencepiece_bytes import SentencePieceBytes
from plait.text.tokenizer import Tokenizer

__all__ = ["byte_vocabulary"]


def byte_vocabulary(tokenizer: Tokenizer) -> ByteVocabulary:
    """What a tokenizer makes of bytes; takes some seconds for a large vocabulary.

    Raises:
        IncompatibleError: its encodings do not spell every byte of a text, or cannot be continued token by
            token: vocabularies that are no byte pairs, and tokenizers that normalise text.
    """
    backend, description = plain_backend(tokenizer)
    kind = SentencePieceBytes if description["model"].get("byte_fallback") else ByteLevelBytes
    return kind(tokenizer, backend, description)
