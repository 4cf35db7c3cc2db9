"""Tokenizers from tokenizer.json: the same ids as the tokenizers package, and facts from the files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import mixed_lines
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from vocabularies import byte_level_metadata

from plait.errors import ModelFileError
from plait.text import StreamDecoder, Tokenizer


def _byte_level() -> dict[str, Any]:
    """A byte-level tokenizer.json with a BOS template, truncation and padding."""
    metadata = byte_level_metadata()
    pieces = metadata["tokenizer.ggml.tokens"][3:-1]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False)])
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9, pad_token="</s>")
    return json.loads(tokenizer.to_str())


_CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}


def test_facts_come_from_the_configurations() -> None:
    description = json.dumps(_byte_level())
    tokenizer = Tokenizer.from_json(description, config=_CONFIG)
    assert tokenizer.bos_id == tokenizer.id_of("<s>") == 262
    assert tokenizer.eos_ids == {263, 264}
    assert tokenizer.special_ids == {262, 263, 264}
    assert tokenizer.vocab_size == 266
    assert tokenizer.name == "BPE (tokenizer.json)"
    several = Tokenizer.from_json(description, generation_config={"eos_token_id": [3, 4], "bos_token_id": 5})
    assert several.eos_ids == {3, 4, several.id_of("<|im_end|>")}
    assert several.bos_id == 5
    nothing = {"eos_token_id": None, "bos_token": None}
    assert Tokenizer.from_json(description, config=nothing, generation_config=nothing).bos_id is None


def test_the_template_is_followed_unless_the_configuration_says_otherwise() -> None:
    description = json.dumps(_byte_level())

    def framed(**config: Any) -> list[int]:
        tokenizer = Tokenizer.from_json(description, config={**_CONFIG, **config})
        return tokenizer.encode("", add_special=True)

    assert framed() == [262]
    assert framed(add_bos_token=False) == []
    assert framed(add_eos_token=True) == [262, 263]
    assert framed(add_bos_token=True, add_eos_token=False) == [262]


def test_text_is_neither_cut_nor_padded() -> None:
    tokenizer = Tokenizer.from_json(json.dumps(_byte_level()), config=_CONFIG)
    for text in ("a", "a long text that has more than five tokens <tag> <s>"):
        assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text


def test_special_tokens_are_parsed_only_on_request() -> None:
    tokenizer = Tokenizer.from_json(json.dumps(_byte_level()))
    assert tokenizer.encode("<s><tag>", parse_special=True) == [262, 265]
    plain = tokenizer.encode("<s><tag>")
    assert plain[-1] == 265
    assert not tokenizer.special_ids.intersection(plain)
    assert tokenizer.decode(plain) == "<s><tag>"


def test_files_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(_byte_level()), encoding="utf-8")
    for source in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        assert Tokenizer.from_json(source).eos_ids == {264}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    assert Tokenizer.from_json(tmp_path).eos_ids == {7, 263, 264}
    assert Tokenizer.from_json(tmp_path, config={}, generation_config={}).eos_ids == {264}


@pytest.mark.model
def test_ids_and_text_of_a_real_vocabulary_equal_transformers(
    smollm2_tokenizer: Tokenizer, smollm2_metadata: Mapping[str, Any], tmp_path: Path
) -> None:
    pieces = smollm2_metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in smollm2_metadata["tokenizer.ggml.merges"]]
    source = tokenizers.Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, merges))
    source.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    source.decoder = decoders.ByteLevel()
    source.add_special_tokens(pieces[:17])
    source.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "clean_up_tokenization_spaces": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    ours = Tokenizer.from_json(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    lines = mixed_lines()
    batch = ours.encode_batch(lines, parse_special=True)
    assert batch == theirs(lines, add_special_tokens=False).input_ids
    assert [ours.decode(ids) for ids in batch] == theirs.batch_decode(batch, skip_special_tokens=True)
    assert ours.encode_batch(lines) == smollm2_tokenizer.encode_batch(lines)
    assert ours.eos_ids == smollm2_tokenizer.eos_ids


def _sentencepiece_like(decoder: decoders.Decoder) -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "h", "i", "hi", "▁hi"]
    merges = [("h", "i"), ("▁", "hi")]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    return Tokenizer.from_json(backend.to_str())


@pytest.mark.parametrize(
    ("decoder", "drops_space"),
    [
        (
            decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            ),
            True,
        ),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), False),
        (decoders.Metaspace(), True),
        (decoders.Metaspace(prepend_scheme="never"), False),
    ],
)
def test_sentencepiece_decoders(decoder: decoders.Decoder, drops_space: bool) -> None:
    tokenizer = _sentencepiece_like(decoder)
    assert tokenizer.strips_leading_space is drops_space
    assert tokenizer.decode(tokenizer.encode("hi é  hi")) == ("" if drops_space else " ") + "hi é  hi"


def test_wordpiece_and_whole_words() -> None:
    wordpiece = tokenizers.Tokenizer(
        models.WordPiece(
            {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "play": 3, "##ing": 4, "now": 5}, unk_token="[UNK]"
        )
    )
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = Tokenizer.from_json(wordpiece.to_str())
    assert tokenizer.encode("playing now", add_special=True) == [1, 3, 4, 5, 2]
    assert tokenizer.decode([1, 3, 4, 5, 2]) == "playing now"
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(id) for id in (1, 3, 4, 5)] == ["", "play", "ing", " now"]

    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert Tokenizer.from_json(words.to_str()).decode([0, 1, 1]) == words.decode([0, 1, 1]) == "a b b"


def test_gaps_between_ids_stand_for_no_text() -> None:
    description = _byte_level()
    description["added_tokens"] = []
    description["post_processor"] = description["padding"] = None
    description["model"]["vocab"]["zz"] = 300
    tokenizer = Tokenizer.from_json(json.dumps(description))
    assert tokenizer.vocab_size == 301
    assert tokenizer.decode([299, 300]) == "zz"
    assert 299 in tokenizer.special_ids


def _broken(change: Any) -> str:
    description = _byte_level()
    change(description)
    return json.dumps(description)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"a": ' + "[" * 100_000, "is not JSON"),
        ("{}", "does not describe a tokenizer"),
        (
            _broken(lambda d: d["model"].update(vocab={"a": 4_294_967_295}, merges=[])),
            "highest id is 4294967295",
        ),
        (_broken(lambda d: d["model"].update(merges=["q zz"])), "does not describe a tokenizer"),
        # The package ends in a panic, which is no Exception.
        (_broken(lambda d: d["model"].update(continuing_subword_prefix="##########")), "does not describe"),
        (_broken(lambda d: d["added_tokens"][0].update(id=900)), "'<s>' has id 900 instead of 262"),
        (
            _broken(
                lambda d: d.update(
                    decoder={"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": True}
                )
            ),
            "decoder CTC is not known",
        ),
        (_broken(lambda d: d["post_processor"]["special_tokens"].clear()), "names no id for '<s>'"),
        (
            _broken(lambda d: d["post_processor"]["special_tokens"]["<s>"].update(ids=[10**6])),
            "id 1000000, which is no token",
        ),
    ],
)
def test_faults_are_named(text: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_json(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": {"bos_token": "<none>"}}, "tokenizer_config.json: bos_token '<none>' is not a token"),
        ({"config": {"eos_token": 3}}, "eos_token 3 is not a token"),
        ({"generation_config": {"eos_token_id": [1, 266]}}, "eos_token_id 266 is not an id"),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id '2' is not an id"),
    ],
)
def test_faults_beside_it_are_named(files: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_json(json.dumps(_byte_level()), **files)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        Tokenizer.from_json(tmp_path / "nothing.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelFileError, match="cannot be read"):
        Tokenizer.from_json(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelFileError, match="holds a JSON list"):
        Tokenizer.from_json(tmp_path)


def test_a_failure_that_only_shows_while_encoding_is_an_error_of_the_model() -> None:
    description = _byte_level()
    description["model"]["unk_token"] = "missing"
    description["added_tokens"] = []
    description["post_processor"] = description["padding"] = None
    del description["model"]["vocab"]["z"]
    tokenizer = Tokenizer.from_json(json.dumps(description))
    with pytest.raises(ModelFileError, match="fails on a text: Unk token `missing` not found"):
        tokenizer.encode("z")
    description = _byte_level()
    hostile = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    description["pre_tokenizer"] = hostile
    tokenizer = Tokenizer.from_json(json.dumps(description))
    with pytest.raises(ModelFileError, match="retry-limit"):
        tokenizer.encode("a" * 40 + "b")
    assert tokenizer.encode("he")


_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 300) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_ends_in_a_tokenizer_or_one_error(data: st.DataObject) -> None:
    description = _byte_level()
    for _ in range(data.draw(st.integers(1, 2))):
        place: Any = description
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
                place[key] = data.draw(_ANY_JSON)
                break
            place = inner
    try:
        tokenizer = Tokenizer.from_json(json.dumps(description))
        ids = tokenizer.encode("hello <s> é", add_special=True, parse_special=True)
    except ModelFileError:
        return
    tokenizer.decode(ids)
