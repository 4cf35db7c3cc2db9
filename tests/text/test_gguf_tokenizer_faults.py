"""Damaged tokenizer metadata ends in a tokenizer or in one ModelFileError, soon."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import byte_level_metadata, sentencepiece_metadata

from plait.errors import ConfigError, ModelFileError
from plait.text import ChatTemplate, Tokenizer

_BYTE_LEVEL, _SENTENCEPIECE = byte_level_metadata(), sentencepiece_metadata()
_PIECES = _BYTE_LEVEL["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"no tokenizer\.ggml\.model"),
        ({"model": "rwkv"}, r"kind 'rwkv'.*Known: gpt2, llama"),
        ({"model": 3}, r"tokenizer\.ggml\.model must be text, and holds int"),
        ({"tokens": None}, r"no tokenizer\.ggml\.tokens"),
        ({"tokens": "abc"}, "must be a list, and holds str"),
        ({"tokens": ["a", 1]}, "must be a list of text"),
        ({"tokens": ["a", "\udcff"]}, "not UTF-8"),
        ({"tokens": []}, r"0 tokens, outside \[1,"),
        ({"tokens": [*_PIECES[:-1], "<s>"]}, "'<s>' has two ids, 0 and 265"),
        ({"token_type": [1]}, "1 entries for 266 tokens"),
        ({"token_type": ["1"] * 266}, "list of finite numbers"),
        ({"merges": None}, r"no tokenizer\.ggml\.merges"),
        ({"merges": ["he"]}, "merge 'he' does not join"),
        ({"merges": ["h \u4e2d"]}, "does not join"),
        ({"merges": ["z z"]}, "does not join"),
        ({"bos_token_id": 266}, "bos_token_id is 266 but the vocabulary has 266 tokens"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eot_token_id": 1.5}, "must be a whole number"),
        ({"bos_token_id": True}, "must be a whole number"),
        ({"add_bos_token": 1}, "must be true or false"),
    ],
)
def test_byte_level_faults_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_gguf(byte_level_metadata(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, r"no tokenizer\.ggml\.scores"),
        ({"scores": [math.nan] * 275}, "finite numbers"),
        ({"scores": [0.0]}, "1 entries for 275 tokens"),
        ({"unknown_token_id": 275}, "unknown_token_id is 275"),
        ({"add_space_prefix": "yes"}, "must be true or false"),
    ],
)
def test_sentencepiece_faults_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_gguf(sentencepiece_metadata(**changes))


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=280),
    st.lists(st.integers(-2, 9), min_size=266, max_size=266),
    st.lists(st.floats(), min_size=275, max_size=275),
    st.just(np.array([], dtype=np.int32)),
    st.just(np.zeros((2, 3))),
    st.just([["nested"]]),
    st.just({}),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(base=st.sampled_from([_BYTE_LEVEL, _SENTENCEPIECE]), data=st.data())
@pytest.mark.filterwarnings("ignore:The GGUF file does not say")
def test_any_change_ends_in_a_tokenizer_or_one_error(base: Mapping[str, Any], data: st.DataObject) -> None:
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(base)), _VALUES, min_size=1, max_size=3))
    metadata = {**base, **changed}
    try:
        tokenizer = Tokenizer.from_gguf(metadata)
        ChatTemplate.from_gguf({**metadata, "tokenizer.chat_template": "x"})
    except ModelFileError:
        return
    try:
        ids = tokenizer.encode("hello <s> é\n", add_special=True, parse_special=True)
    except ModelFileError:
        return
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    tokenizer.decode(ids)


@pytest.mark.parametrize(
    "pieces",
    [
        ["a" * 1_000_000],
        ["a" * length for length in range(1, 3_000)],
        [f"{number:0512d}" for number in range(20_000)],
    ],
    ids=["one", "growing", "many"],
)
def test_long_pieces_do_not_take_quadratic_time(pieces: list[str]) -> None:
    metadata = sentencepiece_metadata(
        tokens=["<unk>", "<s>", "</s>", *pieces],
        token_type=[2, 3, 3, *[1] * len(pieces)],
        scores=[0.0] * (3 + len(pieces)),
    )
    start = time.monotonic()
    with pytest.raises(ModelFileError, match="characters"):
        Tokenizer.from_gguf(metadata)
    assert time.monotonic() - start < 5


def test_arrays_may_be_numpy_arrays() -> None:
    kinds = np.array(_BYTE_LEVEL["tokenizer.ggml.token_type"], dtype=np.int32)
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(token_type=kinds))
    assert tokenizer.special_ids == Tokenizer.from_gguf(_BYTE_LEVEL).special_ids


def test_the_metadata_is_not_changed() -> None:
    metadata = sentencepiece_metadata(tokens=[*_SENTENCEPIECE["tokenizer.ggml.tokens"][:-1], ""])
    before = {key: list(v) if isinstance(v, list) else v for key, v in metadata.items()}
    Tokenizer.from_gguf(metadata)
    assert metadata == before


def test_a_tokenizer_error_is_not_a_config_error() -> None:
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_gguf({})
    assert not isinstance(caught.value, ConfigError)
