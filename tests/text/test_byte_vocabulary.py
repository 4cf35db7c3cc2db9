"""Which tokens may follow, against encoding the text with what may come after it."""

from __future__ import annotations

import random

import pytest
from vocabularies import byte_level_metadata, sentencepiece_metadata

from plait.errors import ConfigError, IncompatibleError
from plait.text import ByteVocabulary, Tokenizer, byte_vocabulary
from plait.text.byte_vocabulary import completions, split_dangling

TEXTS = [
    "Hello world, it's  a test.\n\n  def f(x):\n        return 12345 + x\r\n",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d\uff0c\u4e16\u754c\uff01 \U0001f600\U0001f44d\U0001f3fd ok \U0001f600",
    " \u00e9\U0001f600\u00a0x don't  we'll 'tis   \n\n\n  a\0b",
    "x\t\ty   z    \n    q hello<tag> hellohe<ta  <tag><tag>ll he  hello \u00e9\u00e9l",
]
AFTER = ["", "a", "!", "0", " ", "\n"]


@pytest.fixture(scope="module", params=["byte level", "sentencepiece"])
def small(request: pytest.FixtureRequest) -> ByteVocabulary:
    metadata = byte_level_metadata() if request.param == "byte level" else sentencepiece_metadata()
    return byte_vocabulary(Tokenizer.from_gguf(metadata))


@pytest.fixture(scope="module")
def smollm2_bytes(smollm2_tokenizer: Tokenizer) -> ByteVocabulary:
    return byte_vocabulary(smollm2_tokenizer)


def check(vocabulary: ByteVocabulary, text: str, samples: int) -> None:
    """Walk the encoding of a text; try tokens at every step that ends a character."""
    choose = random.Random(3)
    data = vocabulary.lead + text.encode()
    ids = vocabulary.encode(data.decode())
    assert vocabulary.may_end(ids, data)
    for count, token in enumerate(ids):
        begun = b"".join(vocabulary.texts[id] for id in ids[:count])
        mask = vocabulary.successors(ids[:count], begun)
        assert mask[token]
        assert tuple(ids[:count]) in vocabulary.encodings(begun)
        everyone = range(vocabulary.vocab_size)
        tried = everyone if samples >= len(everyone) else choose.sample(everyone, samples)
        tried = {*tried, *choose.choices(mask.nonzero()[0].tolist(), k=samples)}
        for other in tried:
            try:
                written = (begun + vocabulary.texts[other]).decode()
            except UnicodeDecodeError:
                continue
            expected = [*ids[:count], other]
            may = any(vocabulary.encode(written + end)[: count + 1] == expected for end in AFTER)
            assert mask[other] == (may and vocabulary.lengths[other] > 0), (begun, vocabulary.texts[other])


@pytest.mark.parametrize("text", TEXTS)
def test_successors_are_what_the_tokenizer_does(small: ByteVocabulary, text: str) -> None:
    check(small, text, samples=25)


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_successors_of_the_real_vocabulary(smollm2_bytes: ByteVocabulary, text: str) -> None:
    check(smollm2_bytes, text.replace("\0", ""), samples=4)


def test_special_tokens_in_text_are_text(small: ByteVocabulary) -> None:
    data = small.lead + b"<s>hello</s>"
    (ids,) = small.encodings(data)
    assert not set(ids) & small.tokenizer.special_ids
    assert b"".join(small.texts[id] for id in ids) == data


def test_half_characters(small: ByteVocabulary) -> None:
    assert split_dangling("a\u00e9".encode()[:-1]) == ("a", b"\xc3")
    for bad in (b"\xff", b"a\xc3b", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5", b"\x80"):
        with pytest.raises(ConfigError, match="UTF-8"):
            split_dangling(bad)
        with pytest.raises(ConfigError, match="UTF-8"):
            small.encodings(bad)
    for character in "\u0080\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff":
        data = character.encode()
        for size in range(1, len(data)):
            assert any(ord(character) in part for part in completions(data[:size]))
            assert small.encodings(small.lead + data[:size])


def test_a_character_with_a_piece_is_never_spelled_in_bytes() -> None:
    vocabulary = byte_vocabulary(Tokenizer.from_gguf(sentencepiece_metadata()))
    begun = vocabulary.tokenizer.id_of("<0xC3>")
    assert begun is not None
    mask = vocabulary.successors([vocabulary.ids_of_pieces["\u2581"], begun], b" \xc3")
    spelled = {vocabulary.texts[id] for id in mask.nonzero()[0].tolist()}
    assert spelled == {bytes([byte]) for byte in range(0x80, 0xC0)} - {b"\xa9"}


def test_what_has_no_exact_bytes_is_refused() -> None:
    composing = Tokenizer.from_gguf(byte_level_metadata(pre="qwen2"))
    with pytest.raises(IncompatibleError, match="changes text"):
        byte_vocabulary(composing)
    vocabulary = byte_vocabulary(Tokenizer.from_gguf(sentencepiece_metadata()))
    with pytest.raises(ConfigError, match="2581"):
        vocabulary.encodings(" a\u2581b".encode())
    unigram = '{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}, "added_tokens": []}'
    with pytest.raises(IncompatibleError, match="byte-pair"):
        byte_vocabulary(Tokenizer.from_json(unigram))
