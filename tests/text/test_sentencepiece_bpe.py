"""SentencePiece BPE from GGUF metadata equals the sentencepiece package on any vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_model import sentencepiece_of
from vocabularies import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, sentencepiece_metadata

from plait.text import Tokenizer


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, Any]:
    """Pieces over two letters, spaces and `<`: some that merges reach, some that they do not."""
    pieces = ["▁", "a", "b", "<"]
    for _ in range(draw(st.integers(0, 12))):
        union = draw(st.sampled_from(pieces)) + draw(st.sampled_from(pieces))
        pieces.append(union)
    pieces += draw(st.lists(st.text("ab▁", min_size=2, max_size=5), max_size=5))
    pieces = draw(st.permutations(sorted({piece for piece in pieces if len(piece) <= 8})))
    own = [USER_DEFINED if len(p) > 1 and draw(st.integers(0, 9)) == 0 else NORMAL for p in pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *own],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": draw(st.booleans()),
    }


@settings(max_examples=150, deadline=None)
@given(metadata=vocabularies(), texts=st.lists(st.text("ab <é▁\n", max_size=30), min_size=1, max_size=8))
def test_ids_and_text_equal_sentencepiece(metadata: dict[str, Any], texts: list[str]) -> None:
    ours, reference = Tokenizer.from_gguf(metadata), sentencepiece_of(metadata)
    for text in texts:
        ids = ours.encode(text)
        assert ids == reference.encode(text)
        assert ours.decode(ids) == reference.decode(ids)


@pytest.mark.model
@pytest.mark.parametrize("adds_space", [False, True])
def test_the_space_prefix_on_a_real_vocabulary(gemma3_metadata: dict[str, Any], adds_space: bool) -> None:
    from text_corpus import mixed_lines

    metadata = {**gemma3_metadata, "tokenizer.ggml.add_space_prefix": adds_space}
    ours, reference = Tokenizer.from_gguf(metadata), sentencepiece_of(metadata)
    lines = mixed_lines()
    batch = reference.encode(lines)
    assert ours.encode_batch(lines) == batch
    assert [ours.decode(ids) for ids in batch] == reference.decode(batch)


def test_every_stretch_between_special_tokens_starts_with_a_space() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    hello, bos, end = tokenizer.id_of("▁hello"), tokenizer.id_of("<s>"), tokenizer.id_of("<|end|>")
    tag, w = tokenizer.id_of("<tag>"), tokenizer.id_of("w")
    encoded = tokenizer.encode("<s>hello<|end|><|end|>hello<tag>w", parse_special=True)
    assert encoded == [bos, hello, end, end, hello, tag, w]
    assert tokenizer.encode("hello", parse_special=True) == tokenizer.encode("hello") == [hello]
    assert tokenizer.encode("") == tokenizer.encode("", parse_special=True) == []
    assert tokenizer.encode("", add_special=True) == [bos]


def test_phi3_special_tokens_swallow_the_white_space_after_them() -> None:
    metadata = sentencepiece_metadata()
    tokenizer = Tokenizer.from_gguf({**metadata, "general.architecture": "phi3"})
    hello, bos, end = tokenizer.id_of("▁hello"), tokenizer.id_of("<s>"), tokenizer.id_of("<|end|>")
    assert tokenizer.encode("<|end|>\n hello<|end|>\n<|end|>\n", parse_special=True) == [end, hello, end, end]
    after_bos = tokenizer.encode("<s> hello", parse_special=True)
    assert after_bos == [bos, *tokenizer.encode(" hello")] != [bos, hello]
    other = Tokenizer.from_gguf({**metadata, "general.architecture": "llama"})
    assert len(other.encode("<|end|>\nhello", parse_special=True)) > 2


def test_decoding_drops_one_leading_space_unless_the_text_continues() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    ids = tokenizer.encode("hello w")
    assert tokenizer.decode(ids) == "hello w"
    assert tokenizer.decode(ids, continues=True) == " hello w"
    assert tokenizer.decode(tokenizer.encode("  hello")) == "  hello"
    unprefixed = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False))
    assert unprefixed.decode(unprefixed.encode(" hello")) == " hello"
