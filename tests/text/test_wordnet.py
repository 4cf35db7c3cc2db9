from __future__ import annotations

from pathlib import Path

import pytest
from tiny_wordnet import SENSES, write_wordnet

from plait.errors import ModelFileError
from plait.text.wordnet import PARTS, WordNet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_wordnet(tmp_path / "dict")


def test_every_listed_word_is_found_with_its_sense(folder: Path) -> None:
    wordnet = WordNet(folder)
    for part, name in PARTS.items():
        for words, count in SENSES[name]:
            for word in words:
                (place,) = wordnet.senses(word, part)
                assert wordnet.synset(part, place).words == words
                assert wordnet.uses(word) == {part: count}


def test_similar_adjectives_are_linked(folder: Path) -> None:
    wordnet = WordNet(folder)
    (place,) = wordnet.senses("big", "a")
    (near,) = wordnet.synset("a", place).similar
    assert wordnet.synset("a", near).words == ("enormous", "huge")


@pytest.mark.parametrize("word", ["", "a", "aa", "do", "dogs", "zzz", "dog ", "~"])
def test_a_word_that_is_not_listed_has_no_sense(folder: Path, word: str) -> None:
    assert WordNet(folder).senses(word, "n") == ()
    assert WordNet(folder).uses(word) == {}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("index.noun", lambda text: text.replace("dog n 1 1", "dog n 2 1")),
        ("index.noun", lambda text: text.replace("dog n 1 1", "dog n 1 x")),
        ("index.noun", lambda text: text.replace("dog n 1 1 @", "dog n 1 9 @")),
        ("data.noun", lambda text: text.replace(" 02 dog", " ff dog")),
        ("data.noun", lambda text: text.replace(" 02 dog", " zz dog")),
        ("data.noun", lambda text: text.replace("This", "That is longer")),
        ("data.noun", lambda text: text[:30]),
        ("index.sense", lambda text: text.replace("dog%1", "dog%8")),
        ("index.sense", lambda text: text.replace("1 9\n", "1 many\n")),
    ],
)
def test_a_damaged_line_is_one_error_that_names_the_file(folder: Path, name: str, damage) -> None:
    path = folder / name
    path.write_text(damage(path.read_text()))

    def read() -> None:
        wordnet = WordNet(folder)
        for place in wordnet.senses("dog", "n"):
            wordnet.synset("n", place)
        wordnet.uses("dog")

    with pytest.raises(ModelFileError, match=r"dict/(data|index)"):
        read()


def test_a_missing_or_empty_file_is_refused(folder: Path) -> None:
    (folder / "data.adv").write_text("")
    with pytest.raises(ModelFileError, match="0 bytes"):
        WordNet(folder)
    (folder / "data.adv").unlink()
    with pytest.raises(ModelFileError, match="cannot be read"):
        WordNet(folder)
    with pytest.raises(ModelFileError, match="has no byte"):
        WordNet(write_wordnet(folder)).synset("n", 10**9)


def test_a_file_without_ends_of_lines_is_refused(folder: Path) -> None:
    (folder / "index.noun").write_bytes(b"a" * 500_000)
    with pytest.raises(ModelFileError, match="not WordNet's"):
        WordNet(folder).senses("dog", "n")
