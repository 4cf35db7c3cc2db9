"""Stop strings are found across pieces, at the same place however the text is cut."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import ConfigError
from plait.text import StopStrings

_TEXTS = st.text("ab\n", max_size=25)
_STOPS = st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=4)


def _expected(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Start and end of the match that is complete first, by trying every end."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end - max(map(len, found)), end
    return None


def _run(matcher: StopStrings, pieces: list[str]) -> tuple[str, bool]:
    emitted = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        emitted += text
        if stopped:
            return emitted, True
    return emitted + matcher.finish(), False


def _cut(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


@settings(max_examples=500)
@given(text=_TEXTS, stops=_STOPS, cuts=st.lists(st.integers(0, 100)), include=st.booleans())
def test_the_first_complete_stop_string_ends_the_text(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopStrings(stops, include=include)
    emitted, stopped = _run(matcher, _cut(text, cuts))
    match = _expected(text, stops)
    if match is None:
        assert (emitted, stopped, matcher.found) == (text, False, None)
    else:
        start, end = match
        assert (emitted, stopped) == (text[: end if include else start], True)
        assert matcher.found == text[start:end]


@settings(max_examples=500)
@given(text=_TEXTS, stops=_STOPS)
def test_only_a_start_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher, emitted = StopStrings(stops), ""
    for end, character in enumerate(text, start=1):
        piece, stopped = matcher.push(character)
        if stopped:
            return
        emitted += piece
        held = text[len(emitted) : end]
        assert emitted + held == text[:end]
        longest = max(
            (n for stop in stops for n in range(1, len(stop)) if text[:end].endswith(stop[:n])), default=0
        )
        assert len(held) == longest


def test_text_after_the_stop_string_is_dropped() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("one EN") == ("one ", False)
    assert matcher.push("D two") == ("", True)
    assert matcher.push("three") == ("", True)
    assert matcher.finish() == ""
    assert matcher.found == "END"


def test_a_false_start_is_given_back() -> None:
    matcher = StopStrings(["\n\nuser:", "</s>"])
    assert matcher.push("a\n") == ("a", False)
    assert matcher.push("\nuse ") == ("\n\nuse ", False)
    assert matcher.push("</") == ("", False)
    assert matcher.finish() == "</"
    assert matcher.finish() == ""


def test_of_two_that_end_together_the_longer_counts() -> None:
    matcher = StopStrings(["b", "ab", "zab"])
    assert matcher.push("xab") == ("x", True)
    assert matcher.found == "ab"


def test_no_stop_strings_hold_nothing_back() -> None:
    assert StopStrings([]).push("text") == ("text", False)


@pytest.mark.parametrize("stops", [[""], ["a", ""], [None], [b"a"]])
def test_an_empty_stop_string_is_an_error(stops: list[str]) -> None:
    with pytest.raises(ConfigError, match="at least one character"):
        StopStrings(stops)


def test_a_text_instead_of_a_list_is_an_error() -> None:
    with pytest.raises(ConfigError, match="list of text"):
        StopStrings("stop")


def test_a_hostile_stop_string_takes_linear_time() -> None:
    matcher = StopStrings(["a" * 200_000 + "b"])
    start = time.monotonic()
    for _ in range(2_000):
        assert matcher.push("a" * 100)[1] is False
    assert matcher.push("b") == ("", True)
    # Comparing every start with every end would take 2e10 steps.
    assert time.monotonic() - start < 30
