"""Gemma 3: token ids and decoded text equal to SentencePiece's and transformers' on ten thousand lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from sentencepiece import SentencePieceProcessor
from sentencepiece_model import sentencepiece_of
from text_corpus import mixed_lines

from plait.text import Tokenizer

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def reference(gemma3_metadata: Mapping[str, Any]) -> SentencePieceProcessor:
    return sentencepiece_of(gemma3_metadata)


@pytest.fixture(scope="module")
def hugging_face(gemma3_gguf: Path) -> tokenizers.Tokenizer:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma3_gguf.parent, gguf_file=gemma3_gguf.name)
    return tokenizer.backend_tokenizer


def _transformers_differs(line: str) -> bool:
    """It does not match runs of spaces whole, which shows where a run is longer than any token."""
    return " " * 32 in line or "\u2581" in line


def test_plain_ids_equal_sentencepiece(
    gemma3_tokenizer: Tokenizer, reference: SentencePieceProcessor
) -> None:
    lines = mixed_lines()
    assert gemma3_tokenizer.encode_batch(lines) == reference.encode(lines)


def test_decoded_text_equals_sentencepiece(
    gemma3_tokenizer: Tokenizer, reference: SentencePieceProcessor
) -> None:
    batch = reference.encode(mixed_lines())
    assert [gemma3_tokenizer.decode(ids) for ids in batch] == reference.decode(batch)


@pytest.mark.parametrize("parse_special", [False, True])
def test_ids_equal_transformers(
    gemma3_tokenizer: Tokenizer, hugging_face: tokenizers.Tokenizer, parse_special: bool
) -> None:
    lines = [line for line in mixed_lines() if not _transformers_differs(line)]
    assert len(lines) > 9_900
    hugging_face.encode_special_tokens = not parse_special
    theirs = [encoding.ids for encoding in hugging_face.encode_batch(lines, add_special_tokens=False)]
    assert gemma3_tokenizer.encode_batch(lines, parse_special=parse_special) == theirs


def test_special_tokens_between_stretches_of_text(
    gemma3_tokenizer: Tokenizer, reference: SentencePieceProcessor
) -> None:
    turn = gemma3_tokenizer.id_of("<start_of_turn>")
    end = gemma3_tokenizer.id_of("<end_of_turn>")
    text = "<start_of_turn>user\n  Hi <table> there<end_of_turn>\n"
    middle, last = reference.encode("user\n  Hi <table> there"), reference.encode("\n")
    assert gemma3_tokenizer.encode(text, parse_special=True) == [turn, *middle, end, *last]
    assert gemma3_tokenizer.encode(text) == reference.encode(text)


def test_text_comes_back_unless_it_holds_the_mark_of_a_space(gemma3_tokenizer: Tokenizer) -> None:
    lines = [line for line in mixed_lines() if "\u2581" not in line]
    assert [gemma3_tokenizer.decode(ids) for ids in gemma3_tokenizer.encode_batch(lines)] == lines


def test_facts_of_the_file(gemma3_tokenizer: Tokenizer) -> None:
    assert gemma3_tokenizer.vocab_size == 262144
    assert gemma3_tokenizer.bos_id == gemma3_tokenizer.id_of("<bos>") == 2
    # </s> is a tag of HTML here, not an end.
    assert gemma3_tokenizer.eos_ids == {
        gemma3_tokenizer.id_of("<eos>"),
        gemma3_tokenizer.id_of("<end_of_turn>"),
    }
    assert gemma3_tokenizer.encode("Hello", add_special=True) == [2, *gemma3_tokenizer.encode("Hello")]
    assert gemma3_tokenizer.token_bytes(gemma3_tokenizer.id_of("<0x0A>") or -1) == b"\n"
    assert gemma3_tokenizer.token_bytes(gemma3_tokenizer.id_of("\u2581the") or -1) == b" the"
    assert gemma3_tokenizer.token_bytes(2) == b""
