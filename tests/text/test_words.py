from __future__ import annotations

from pathlib import Path

import pytest
from tiny_wordnet import write_wordnet

from plait.text.wordnet import WordNet
from plait.text.words import Form, Lexicon, matched_case, needs_an, split_words


@pytest.fixture
def lexicon(tmp_path: Path) -> Lexicon:
    return Lexicon(WordNet(write_wordnet(tmp_path / "dict")))


def test_words_lie_where_they_say_and_sentences_are_counted() -> None:
    text = "The dog ran. It was 3.5 miles!\n\nDon't stop, naïve friend."
    words = split_words(text)
    assert all(text[word.start : word.stop] == word.text for word in words)
    assert [word.text for word in words] == [
        "The", "dog", "ran", "It", "was", "3.5", "miles", "Don't", "stop", "naïve", "friend",
    ]  # fmt: skip
    assert [word.sentence for word in words] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "text",
    [
        'He said "dog" twice',
        "use `dog` here",
        "see https://example.org/dog now",
        "write to dog@example.org soon",
        "a \u201cbig dog\u201d",
        "```\ndog\n```",
        "text\n    dog\nmore",
        "the DOG, my Dog, dog2, dog_house, hot-dog",
    ],
)
def test_quotations_code_addresses_and_names_are_never_free(text: str) -> None:
    assert not [word for word in split_words(text) if word.is_free and "dog" in word.text.lower()]


def test_only_the_first_word_of_a_sentence_may_have_a_capital() -> None:
    words = {word.text: word.is_free for word in split_words("Dogs bark. Cars in Paris start.")}
    assert words == {"Dogs": True, "bark": True, "Cars": True, "in": True, "Paris": False, "start": True}


def test_alternatives_have_the_form_of_the_word(lexicon: Lexicon) -> None:
    assert lexicon.form("bought") == Form("buy", "v", "VBD")
    assert lexicon.alternatives("bought") == ("purchased",)
    assert set(lexicon.alternatives("started")) == {"began", "commenced"}
    assert lexicon.alternatives("dogs") == ("hounds",)
    assert lexicon.alternatives("quickly") == ("rapidly",)
    assert set(lexicon.alternatives("big")) == {"large", "enormous", "huge"}


def test_being_an_alternative_is_mutual(lexicon: Lexicon) -> None:
    for word in ("big", "large", "huge", "began", "helping", "cars", "often", "children"):
        for other in lexicon.alternatives(word):
            assert word in lexicon.alternatives(other), (word, other)


@pytest.mark.parametrize("word", ["the", "of", "xyzzy", "apple", ""])
def test_function_words_and_lonely_words_have_no_alternatives(lexicon: Lexicon, word: str) -> None:
    assert lexicon.alternatives(word) == ()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("apple", True), ("hour", True), ("honest", True), ("umbrella", True), ("uncle", True), ("unusual", True),
        ("useful", False), ("university", False), ("unit", False), ("one", False), ("European", False),
        ("car", False), ("house", False), ("unimportant", True), ("usual", False), ("utility", False),
    ],
)  # fmt: skip
def test_the_article_follows_the_sound(word: str, expected: bool) -> None:
    assert needs_an(word) is expected


def test_a_capital_is_kept() -> None:
    assert matched_case("large", "Big") == "Large"
    assert matched_case("large", "big") == "large"
