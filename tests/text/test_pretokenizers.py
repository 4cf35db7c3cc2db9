"""Each way to cut text, against the class or pattern that Hugging Face publishes for its models."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import tokenizers
from text_corpus import mixed_lines
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import CohereTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer
from vocabularies import byte_level_metadata

from plait.errors import ModelFileError
from plait.text import Tokenizer
from plait.text.pretokenizers import PRE_TOKENIZERS

_CLASSES = {
    "gpt-2": GPT2Tokenizer,
    "olmo": GPTNeoXTokenizer,
    "command-r": CohereTokenizer,
    "qwen2": Qwen2Tokenizer,
    "qwen35": Qwen3_5Tokenizer,
}
# Where transformers' table has llama.cpp's name but not the NFC of the model's own class.
_COMPOSING = {"qwen2", "deepseek-r1-qwen", "megrez", "qwen35"}
_SPLITS = sorted(set(GGUF_PRE_TOKENIZER_SPLITS) & set(PRE_TOKENIZERS))

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# The `pre_tokenizer` of the models' published tokenizer.json, in its own form.
_PUBLISHED = {
    "falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {**_BYTE_LEVEL, "use_regex": True},
        {"type": "Digits", "individual_digits": False},
        _split("[0-9][0-9][0-9]"),
    ],
    "deepseek-coder": [
        _split("[\r\n]"),
        _split("\\s?\\p{L}+"),
        _split("\\s?\\p{P}+"),
        _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
        {"type": "Digits", "individual_digits": True},
        _BYTE_LEVEL,
    ],
    "deepseek-v3": [
        _split("\\p{N}{1,3}"),
        _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
        _split(
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
        ),
        _BYTE_LEVEL,
    ],
    "bloom": [_split(" ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"), _BYTE_LEVEL],
    "starcoder": [{"type": "Digits", "individual_digits": True}, {**_BYTE_LEVEL, "use_regex": True}],
}


@pytest.fixture(scope="module")
def text() -> list[str]:
    """The mixed lines, and those with marks taken apart, which NFC puts together again."""
    return [
        *mixed_lines()[::9],
        "e\u0301 A\u030a \u1100\u1161 \u304b\u3099 \u1112\u1161\u11ab",
        "\u212b \ufb01 \u0958",
    ]


def _words(backend: tokenizers.Tokenizer, line: str) -> list[str]:
    normal = backend.normalizer.normalize_str(line) if backend.normalizer else line
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]


def _our_words(name: str, line: str) -> list[str]:
    known = PRE_TOKENIZERS[name]
    normal = normalizers.NFC().normalize_str(line) if known.composes else line
    return [word for word, _ in known.cut().pre_tokenize_str(normal)]


@pytest.mark.parametrize("name", sorted(_CLASSES))
def test_words_equal_those_of_the_class(name: str, text: list[str]) -> None:
    backend = _CLASSES[name](vocab={"a": 0, "<|endoftext|>": 1}, merges=[]).backend_tokenizer
    for line in text:
        assert _our_words(name, line) == _words(backend, line)


@pytest.mark.parametrize("name", _SPLITS)
def test_words_equal_those_of_the_published_pattern(name: str, text: list[str]) -> None:
    pattern = Regex(GGUF_PRE_TOKENIZER_SPLITS[name])
    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    for line in text:
        normal = normalizers.NFC().normalize_str(line) if name in _COMPOSING else line
        assert _our_words(name, line) == [word for word, _ in cut.pre_tokenize_str(normal)]


@pytest.mark.parametrize("name", sorted(_PUBLISHED))
def test_words_equal_those_of_the_published_description(name: str, text: list[str]) -> None:
    description = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PUBLISHED[name]},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    for line in text:
        assert _our_words(name, line) == _words(backend, line)


def test_the_default_cut() -> None:
    assert _our_words("default", "Hi there, x=12345!") == ["Hi", "Ġthere", ",", "Ġx", "=", "123", "45", "!"]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_no_text_is_lost_and_long_runs_take_linear_time(name: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre=name))
    runs = [
        unit * 20_000 for unit in (" ", "\n", " \n", "a", "A", "1", "=", "'s", "中", "\u0301", "x ", "\t")
    ]
    mixed = ["".join(parts) for parts in itertools.permutations(["  ", "\n", "x", "12345", "¿", "é"], 3)]
    start = time.monotonic()
    texts = [run + end for run in runs for end in ("", "x")] + mixed
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
    # Quadratic time would take hours.
    assert time.monotonic() - start < 60


@pytest.mark.model
def test_ids_of_every_cut_equal_transformers_on_a_real_vocabulary(
    smollm2_metadata: Mapping[str, Any],
) -> None:
    pieces = smollm2_metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in smollm2_metadata["tokenizer.ggml.merges"]]
    lines = [line for line in mixed_lines()[::5] if "<" not in line]
    for name, kind in _CLASSES.items():
        theirs = kind(vocab={piece: id for id, piece in enumerate(pieces)}, merges=merges).backend_tokenizer
        ours = Tokenizer.from_gguf({**smollm2_metadata, "tokenizer.ggml.pre": name})
        expected = [encoding.ids for encoding in theirs.encode_batch(lines, add_special_tokens=False)]
        assert ours.encode_batch(lines) == expected, name


def test_a_word_that_is_a_token_needs_no_merges() -> None:
    metadata = byte_level_metadata(merges=["h e", "l l", "he ll", "Ġ w", "1 2"])
    assert len(Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "llama-bpe"}).encode("hello")) == 1
    assert len(Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "gpt-2"}).encode("hello")) == 2


def test_llama3_adds_bos_unless_the_file_says_otherwise() -> None:
    bos = Tokenizer.from_gguf(byte_level_metadata(pre="llama-bpe")).encode("he", add_special=True)[0]
    assert bos == 0
    metadata = byte_level_metadata(pre="llama-bpe", add_bos_token=False, add_eos_token=True)
    assert Tokenizer.from_gguf(metadata).encode("", add_special=True) == [1]


def test_an_unknown_cut_is_named() -> None:
    with pytest.raises(ModelFileError, match=r"'smolm'.*Did you mean 'smollm'\?.*Known: .*qwen2"):
        Tokenizer.from_gguf(byte_level_metadata(pre="smolm"))


def test_a_missing_cut_is_announced() -> None:
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre.*default") as record:
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre=None))
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explicit = Tokenizer.from_gguf(byte_level_metadata(pre="default"))
    assert tokenizer.encode("x 12345") == explicit.encode("x 12345")
