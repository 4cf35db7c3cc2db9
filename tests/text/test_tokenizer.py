"""What every tokenizer does, whatever its kind."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import mixed_lines
from vocabularies import CONTROL, UNUSED, byte_level_metadata, sentencepiece_metadata

from plait.errors import ConfigError
from plait.text import Tokenizer

_TOKENIZERS = [Tokenizer.from_gguf(byte_level_metadata()), Tokenizer.from_gguf(sentencepiece_metadata())]


@pytest.fixture(params=_TOKENIZERS, ids=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param


@settings(max_examples=300)
@given(text=st.text(), index=st.integers(0, 1))
def test_any_text_comes_back(text: str, index: int) -> None:
    tokenizer = _TOKENIZERS[index]
    ids = tokenizer.encode(text)
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    expected = text.replace("\u2581", " ") if index else text
    assert tokenizer.decode(ids) == expected


@given(
    parts=st.lists(
        st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|end|>", "<unk>", "<", ">", "hello", " "])
    ),
    index=st.integers(0, 1),
)
def test_names_of_special_tokens_in_text_are_text(parts: list[str], index: int) -> None:
    tokenizer, text = _TOKENIZERS[index], "".join(parts)
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_parsed_on_request(tokenizer: Tokenizer) -> None:
    bos, eos = tokenizer.id_of("<s>"), tokenizer.id_of("</s>")
    ids = tokenizer.encode("<s>hello</s>", parse_special=True)
    assert [ids[0], ids[-1]] == [bos, eos] == [tokenizer.bos_id, tokenizer.id_of("</s>")]
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special=False).replace(" ", "") == "<s>hello</s>"


def test_user_defined_tokens_are_always_matched_and_stand_for_their_text(tokenizer: Tokenizer) -> None:
    tag = tokenizer.id_of("<tag>")
    assert tag is not None
    assert tokenizer.encode("hello<tag>hello").count(tag) == 1
    assert tokenizer.decode(tokenizer.encode("a <tag>b")) == "a <tag>b"
    assert tokenizer.token_bytes(tag) == b"<tag>"
    assert tag not in tokenizer.special_ids


def test_ends_are_eos_and_the_control_tokens_that_end_a_turn() -> None:
    byte_level, sentencepiece = _TOKENIZERS
    assert byte_level.eos_ids == {byte_level.id_of("</s>"), byte_level.id_of("<|im_end|>")}
    assert sentencepiece.eos_ids == {sentencepiece.id_of("</s>"), sentencepiece.id_of("<|end|>")}
    named = Tokenizer.from_gguf(byte_level_metadata(eot_token_id=5, eom_token_id=6, eos_token_id=None))
    assert named.eos_ids == {5, 6, named.id_of("<|im_end|>")}


def test_unknown_text_without_byte_fallback_becomes_one_unknown_token() -> None:
    metadata = sentencepiece_metadata()
    kept = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind != 6]
    for key in ("tokens", "token_type", "scores"):
        metadata[f"tokenizer.ggml.{key}"] = [metadata[f"tokenizer.ggml.{key}"][i] for i in kept]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("hello中文") == [tokenizer.id_of("▁hello"), 0]
    assert tokenizer.token_bytes(0) == b""


def test_bytes_of_tokens() -> None:
    byte_level, sentencepiece = _TOKENIZERS
    spelled = {byte_level.token_bytes(id) for id in range(byte_level.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= spelled
    assert byte_level.token_bytes(byte_level.id_of("Ġw") or -1) == b" w"
    assert byte_level.token_bytes(0) == sentencepiece.token_bytes(0) == b""
    assert sentencepiece.token_bytes(sentencepiece.id_of("▁hello") or -1) == b" hello"
    assert sentencepiece.token_bytes(sentencepiece.id_of("<0xE9>") or -1) == b"\xe9"
    assert sentencepiece.token_bytes(sentencepiece.id_of("é") or -1) == "é".encode()


@given(ids=st.lists(st.integers(0, _TOKENIZERS[1].vocab_size - 1)))
def test_decoding_reads_the_joined_bytes_as_utf8(ids: list[int]) -> None:
    tokenizer = _TOKENIZERS[1]
    data = b"".join(tokenizer.token_bytes(id) for id in ids)
    assert tokenizer.decode(ids, continues=True) == data.decode("utf-8", errors="replace")
    assert tokenizer.decode(ids) == data.removeprefix(b" ").decode("utf-8", errors="replace")


@pytest.mark.parametrize("id", [-1, 266, 10**30])
def test_an_id_outside_the_vocabulary_is_named(id: int) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    for call in (tokenizer.token_bytes, lambda id: tokenizer.decode([5, id])):
        with pytest.raises(ConfigError, match=rf"{id}.*266 tokens"):
            call(id)


def test_ids_may_be_numpy_integers(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello w")
    assert tokenizer.decode(np.array(ids)) == "hello w"
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])  # type: ignore[list-item]


def test_half_a_surrogate_pair_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="Character 2 of the text is half of a surrogate pair"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(ConfigError, match="surrogate"):
        tokenizer.encode_batch(["fine", "\udfff"])
    assert tokenizer.encode("😀")


@pytest.mark.parametrize("texts", ["text", [b"bytes"], [("a", "pair")], [None], [1]])
def test_only_text_is_encoded(tokenizer: Tokenizer, texts: Any) -> None:
    with pytest.raises(ConfigError, match="Only text"):
        tokenizer.encode_batch(texts)


def test_a_batch_equals_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    lines = mixed_lines()[::50]
    for special in (False, True):
        options = {"add_special": special, "parse_special": special}
        assert tokenizer.encode_batch(lines, **options) == [tokenizer.encode(x, **options) for x in lines]
    assert tokenizer.encode_batch([]) == []


def test_threads_choose_freely_whether_special_tokens_are_parsed(tokenizer: Tokenizer) -> None:
    text = "<s>hello</s>" * 50
    plain, parsed = tokenizer.encode(text), tokenizer.encode(text, parse_special=True)
    wrong: list[list[int]] = []

    def work(parse_special: bool) -> None:
        expected = parsed if parse_special else plain
        encoded = (tokenizer.encode(text, parse_special=parse_special) for _ in range(100))
        wrong.extend(ids for ids in encoded if ids != expected)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plain != parsed
    assert not wrong


def test_unused_and_empty_tokens_stand_for_no_text() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "[PAD1]", "", ""]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], UNUSED, 1, CONTROL]
    tokenizer = Tokenizer.from_gguf(metadata)
    size = tokenizer.vocab_size
    assert {size - 3, size - 2, size - 1} <= tokenizer.special_ids
    assert tokenizer.decode([size - 3, size - 2, size - 1]) == ""
    assert size - 3 not in tokenizer.encode("[PAD1]", parse_special=True)


def test_names(tokenizer: Tokenizer) -> None:
    assert tokenizer.name in ("byte-level BPE (gpt-2)", "SentencePiece BPE")
    assert repr(tokenizer) == f"<Tokenizer {tokenizer.name}, {tokenizer.vocab_size} tokens>"
    assert tokenizer.id_of("no such token") is None


@pytest.mark.model
def test_making_a_tokenizer_and_encoding_are_quick(
    smollm2_metadata: Mapping[str, Any], gemma3_metadata: Mapping[str, Any]
) -> None:
    # Seconds of CPU time, twice what is promised, because machines differ.
    for metadata, allowed in ((smollm2_metadata, 1.0), (gemma3_metadata, 6.0)):
        start = time.process_time()
        tokenizer = Tokenizer.from_gguf(metadata)
        assert time.process_time() - start < allowed
        start = time.process_time()
        tokenizer.encode_batch(mixed_lines())
        assert time.process_time() - start < 10


def test_tokenizers_with_the_same_ids_know_each_other() -> None:
    byte_level, sentencepiece = _TOKENIZERS
    assert byte_level.has_ids_of(byte_level)
    assert not byte_level.has_ids_of(sentencepiece)
