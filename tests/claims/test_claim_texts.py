"""What claims measure on: passages that were edited, and things of several kinds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.claims.encoders import sentences
from plait.claims.labelled import _in_fifths, labelled_sets
from plait.claims.versions import _passages


class Words:
    """A tokenizer that splits at blanks."""

    def encode(self, text: str) -> list[str]:
        return text.split()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.02, 0.1, 0.5]), tokens=st.sampled_from([20, 60]))
def test_edits_of_a_passage_make_the_new_version_of_it(seed: int, share: float, tokens: int) -> None:
    pick = random.Random(seed)
    old = [f"a line {number} {'word ' * pick.randint(0, 4)}\n" for number in range(80)]
    new: list[str] = []
    for line in old:
        if pick.random() >= share:
            new.append(line)
            continue
        new += pick.choice(
            [[], [f"changed {pick.random()}\n"], [line, f"more {pick.random()}\n", "and more\n"]]
        )
    found = _passages(Words(), old, new, tokens, 5)  # type: ignore[arg-type]
    before, after = "".join(old), "".join(new)
    place = 0
    for text, edits, following in found:
        assert edits
        place = before.index(text, place) + len(text)
        edited = text
        for edit in reversed(edits):
            edited = edited[: edit.start] + edit.text + edited[edit.end :]
        assert edited != text
        assert after.endswith(edited + following)
        assert len(Words().encode(text)) >= tokens
        assert len(Words().encode(following)) >= 5
        assert text.endswith("\n")
        # Whole lines stand before the first change, about a quarter of the passage.
        assert len(Words().encode(text[: edits[0].start])) <= tokens // 4 + 8


def test_a_file_that_did_not_change_has_no_passages() -> None:
    lines = [f"line {number}\n" for number in range(50)]
    assert _passages(Words(), lines, lines, 20, 5) == []  # type: ignore[arg-type]


def test_numbers_are_told_by_the_fifth_that_they_are_in() -> None:
    assert _in_fifths([5, 1, 4, 2, 3]) == ["huge", "tiny", "large", "small", "medium"]
    assert _in_fifths([2, 2, 2, 9, 9]) == ["tiny", "tiny", "tiny", "large", "large"]


@pytest.mark.parametrize("seed", [0, 1])
def test_things_are_given_once_and_examples_hold_every_kind(seed: int) -> None:
    sizes = []
    for things in labelled_sets(random.Random(seed)):
        sizes.append(sum(map(len, things.of_kind.values())))
        lines = things.examples(2 * len(things.kinds), random.Random(seed)).splitlines()
        kinds = [line.rpartition(": ")[2] for line in lines]
        assert all(kinds.count(kind) == 2 for kind in things.kinds)
        assert sizes[-1] - sum(map(len, things.of_kind.values())) == len(lines)
    assert sizes == [150, 178, 569]


def test_sentences_for_judging_are_not_those_for_calibrating() -> None:
    judged, shown = sentences(300), sentences(300, calibration=True)
    assert len(set(judged)) == len(set(shown)) == 300
    assert not set(judged) & set(sentences(10**6, calibration=True))
    assert all(40 <= len(sentence) <= 300 and sentence[0].isupper() for sentence in judged + shown)
    assert not any("\n" in sentence or ">>>" in sentence for sentence in judged + shown)
