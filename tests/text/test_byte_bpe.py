"""Vocabularies that are learned and written: every text comes back, in Transformers too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import ConfigError
from plait.text import Tokenizer, learn_byte_bpe
from plait.text.byte_bpe import PLACEHOLDER

TEXTS = ["def f(x):\n    return x + 1234\n" * 5, "the cat sat on the mat, and the dog sat too. " * 5]
LEARNED = learn_byte_bpe(TEXTS, 300)


@settings(max_examples=80, deadline=None)
@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    assert LEARNED.decode(LEARNED.encode(text)) == text


def test_what_is_frequent_is_one_token_and_digits_stay_apart() -> None:
    assert len(LEARNED.encode("the cat sat")) < 7
    assert len(LEARNED.encode("1234")) == 4
    assert 258 < LEARNED.vocab_size <= 300
    assert LEARNED.eos_ids == {0}
    assert LEARNED.id_of(PLACEHOLDER) == 1
    assert {0, 1} <= LEARNED.special_ids
    assert learn_byte_bpe(TEXTS, 300).has_ids_of(LEARNED)


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 258"):
        learn_byte_bpe(TEXTS, 257)


def test_a_written_tokenizer_is_the_same_one_here_and_in_transformers(tmp_path: Path) -> None:
    import transformers

    LEARNED.save(tmp_path)
    again = Tokenizer.from_json(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "caf\u00e9 \U0001f600\n\n\tx", " leading and trailing "]:
        ids = LEARNED.encode(text)
        assert again.encode(text) == ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (again.eos_ids, again.bos_id) == (LEARNED.eos_ids, LEARNED.bos_id)
    assert again.has_ids_of(LEARNED)


@pytest.mark.model
def test_the_tokenizer_of_a_gguf_file_is_written(smollm2_gguf: Path, tmp_path: Path) -> None:
    from plait.nn.checkpoints.gguf import GGUFCheckpoint

    with GGUFCheckpoint(smollm2_gguf) as checkpoint:
        ours = Tokenizer.from_gguf(checkpoint.metadata)
    ours.save(tmp_path)
    again = Tokenizer.from_json(tmp_path)
    text = "def f(x):\n    return x + 1234  # caf\u00e9 <|im_end|>\n"
    assert again.encode(text) == ours.encode(text)
    assert again.encode(text, parse_special=True) == ours.encode(text, parse_special=True)
    assert (again.eos_ids, again.bos_id) == (ours.eos_ids, ours.bos_id)


def test_only_byte_level_vocabularies_are_written(tmp_path: Path) -> None:
    from vocabularies import sentencepiece_metadata

    with pytest.raises(ConfigError, match="Only byte-level"):
        Tokenizer.from_gguf(sentencepiece_metadata()).save(tmp_path)
