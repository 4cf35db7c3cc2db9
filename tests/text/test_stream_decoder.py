"""Decoding one id at a time gives the same text as decoding all at once, in whole characters."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import mixed_lines
from vocabularies import byte_level_metadata, sentencepiece_metadata

from plait.errors import ConfigError
from plait.text import StreamDecoder, Tokenizer

_TOKENIZERS = [Tokenizer.from_gguf(byte_level_metadata()), Tokenizer.from_gguf(sentencepiece_metadata())]


def _streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    return [*(decoder.push(id) for id in ids), decoder.finish()]


@st.composite
def _ids(draw: st.DrawFn) -> tuple[Tokenizer, list[int]]:
    """Ids of any kind, with many bytes and their characters' parts, which are rare among all ids."""
    tokenizer = draw(st.sampled_from(_TOKENIZERS))
    anything = st.integers(0, tokenizer.vocab_size - 1).map(lambda id: [id])
    text = st.text("é中😀a \u0301", max_size=4).map(tokenizer.encode)
    parts = st.one_of(anything, text, text.map(lambda ids: ids[:-1]), text.map(lambda ids: ids[1:]))
    return tokenizer, list(itertools.chain(*draw(st.lists(parts, max_size=12))))


@settings(max_examples=500)
@given(made=_ids(), skip_special=st.booleans(), continues=st.booleans())
def test_the_stream_equals_decoding_at_once(
    made: tuple[Tokenizer, list[int]], skip_special: bool, continues: bool
) -> None:
    tokenizer, ids = made
    options = {"skip_special": skip_special, "continues": continues}
    assert "".join(_streamed(tokenizer, ids, **options)) == tokenizer.decode(ids, **options)


@settings(max_examples=300)
@given(text=st.text(), index=st.integers(0, 1))
def test_no_piece_of_valid_text_holds_a_replacement(text: str, index: int) -> None:
    tokenizer = _TOKENIZERS[index]
    text = text.replace("\ufffd", "")
    pieces = _streamed(tokenizer, tokenizer.encode(text))
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[-1] == ""


def test_bytes_wait_for_the_rest_of_their_character() -> None:
    tokenizer = _TOKENIZERS[1]
    byte = {value: tokenizer.id_of(f"<0x{value:02X}>") or -1 for value in range(256)}
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(byte[value]) for value in "😀".encode()] == ["", "", "", "😀"]
    assert [decoder.push(byte[value]) for value in (0xF0, 0x9F, 0x41)] == ["", "", "\ufffdA"]
    assert [decoder.push(byte[value]) for value in (0xFF, 0xE2, 0x82)] == ["\ufffd", "", ""]
    assert decoder.finish() == "\ufffd"


def test_only_the_first_space_of_the_first_text_is_dropped() -> None:
    tokenizer = _TOKENIZERS[1]
    bos, hello = tokenizer.id_of("<s>") or -1, tokenizer.id_of("▁hello") or -1
    assert _streamed(tokenizer, [bos, hello, hello]) == ["", "hello", " hello", ""]
    assert _streamed(tokenizer, [hello], continues=True) == [" hello", ""]
    # A special token that is shown is text, so the space after it stays.
    assert _streamed(tokenizer, [bos, hello], skip_special=False) == ["<s>", " hello", ""]


def test_an_id_outside_the_vocabulary_leaves_the_stream_as_it_was() -> None:
    tokenizer = _TOKENIZERS[0]
    decoder = StreamDecoder(tokenizer)
    first, second = tokenizer.encode("é")
    decoder.push(first)
    with pytest.raises(ConfigError, match="266 tokens"):
        decoder.push(266)
    assert decoder.push(second) == "é"


@pytest.mark.model
def test_real_vocabularies(smollm2_tokenizer: Tokenizer, gemma3_tokenizer: Tokenizer) -> None:
    for tokenizer in (smollm2_tokenizer, gemma3_tokenizer):
        for line in mixed_lines()[::10]:
            ids = tokenizer.encode(line, parse_special=True)
            assert "".join(_streamed(tokenizer, ids)) == tokenizer.decode(ids)
