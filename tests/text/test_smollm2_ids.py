"""SmolLM2: token ids and decoded text equal to two independent references on ten thousand lines."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from text_corpus import mixed_lines
from tokenizers import models, pre_tokenizers

from plait.text import Tokenizer

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def reference(smollm2_metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SmolLM2's published definition: each digit apart, then GPT-2's cut, then byte-level BPE."""
    pieces = smollm2_metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in smollm2_metadata["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, merges))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return reference


@pytest.fixture(scope="module")
def hugging_face(smollm2_gguf: Path) -> tokenizers.Tokenizer:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    return tokenizer.backend_tokenizer


def _ids(backend: tokenizers.Tokenizer, lines: list[str], *, parse_special: bool) -> list[list[int]]:
    backend.encode_special_tokens = not parse_special
    return [encoding.ids for encoding in backend.encode_batch(lines, add_special_tokens=False)]


def _transformers_differs(line: str) -> bool:
    """Its converter leaves out the step that sets digits apart.

    No token joins two ASCII digits, so this shows only for other numerals, which are several bytes,
    and for white space before a digit: without the step, its last space belongs to the number.
    """
    numerals = [c for c in line if unicodedata.category(c) in ("Nd", "Nl", "No")]
    return not all(c.isascii() for c in numerals) or re.search(r"\s\s[0-9]", line) is not None


def test_plain_ids_equal_the_published_definition(
    smollm2_tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    lines = mixed_lines()
    assert len(lines) == 10_000
    assert smollm2_tokenizer.encode_batch(lines) == _ids(reference, lines, parse_special=False)


@pytest.mark.parametrize("parse_special", [False, True])
def test_ids_equal_transformers(
    smollm2_tokenizer: Tokenizer, hugging_face: tokenizers.Tokenizer, parse_special: bool
) -> None:
    lines = [line for line in mixed_lines() if not _transformers_differs(line)]
    assert len(lines) > 8_500
    ours = smollm2_tokenizer.encode_batch(lines, parse_special=parse_special)
    assert ours == _ids(hugging_face, lines, parse_special=parse_special)


@pytest.mark.parametrize("skip_special", [False, True])
def test_decoded_text_equals_transformers(
    smollm2_tokenizer: Tokenizer, hugging_face: tokenizers.Tokenizer, skip_special: bool
) -> None:
    batch = smollm2_tokenizer.encode_batch(mixed_lines(), parse_special=True)
    ours = [smollm2_tokenizer.decode(ids, skip_special=skip_special) for ids in batch]
    assert ours == hugging_face.decode_batch(batch, skip_special_tokens=skip_special)


def test_text_comes_back_unless_the_vocabulary_lacks_its_bytes(smollm2_tokenizer: Tokenizer) -> None:
    known = {
        smollm2_tokenizer.token_bytes(id)
        for id in range(smollm2_tokenizer.vocab_size)
        if len(smollm2_tokenizer.token_bytes(id)) == 1
    }
    # The vocabulary was trained without six control characters and the planes above U+3FFFF.
    missing = {byte for byte in range(256) if bytes([byte]) not in known}
    assert missing == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
    lines = [line for line in mixed_lines() if not missing.intersection(line.encode())]
    assert len(lines) > 9_990
    assert [smollm2_tokenizer.decode(ids) for ids in smollm2_tokenizer.encode_batch(lines)] == lines


def test_facts_of_the_file(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.vocab_size == 49152
    assert smollm2_tokenizer.bos_id == smollm2_tokenizer.id_of("<|im_start|>") == 1
    assert smollm2_tokenizer.eos_ids == {
        smollm2_tokenizer.id_of("<|im_end|>"),
        smollm2_tokenizer.id_of("<|endoftext|>"),
    }
    assert smollm2_tokenizer.special_ids == set(range(17))
    # The file says that no BOS is added.
    assert smollm2_tokenizer.encode("Hello", add_special=True) == smollm2_tokenizer.encode("Hello")
