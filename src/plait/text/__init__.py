"""Text and token ids: tokenizers, decoding as tokens arrive, chat templates."""

from __future__ import annotations

from plait.text.byte_bpe import learn_byte_bpe
from plait.text.byte_encoding import byte_vocabulary
from plait.text.byte_vocabulary import ByteVocabulary
from plait.text.chat import ChatTemplate
from plait.text.stream import StopStrings, StreamDecoder
from plait.text.tokenizer import Tokenizer

__all__ = [
    "ByteVocabulary",
    "ChatTemplate",
    "StopStrings",
    "StreamDecoder",
    "Tokenizer",
    "byte_vocabulary",
    "learn_byte_bpe",
]
