from __future__ import annotations

import hashlib
import hmac
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from plait.decode.watermark import Option, Slot, choose_words, count_bits, tail_of_binomial, word_bit
from plait.errors import ConfigError

KEY = bytes(range(32))


def test_bits_are_those_of_hashlib() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        previous, word = ("".join(rng.choices("abcXYZé漢", k=rng.randrange(8))) for _ in range(2))
        digest = hashlib.sha256((previous + word).encode()).hexdigest()
        assert word_bit(None, previous, word) == int(digest, 16) % 2
        message = previous.lower().encode() + b"\x00" + word.lower().encode()
        assert word_bit(KEY, previous, word) == int(hmac.new(KEY, message, "sha256").hexdigest(), 16) % 2


def test_a_key_parts_words_that_the_papers_form_runs_together() -> None:
    assert word_bit(None, "ab", "c") == word_bit(None, "a", "bc")
    assert len({word_bit(KEY, "x" * n, "y" * (40 - n)) for n in range(40)}) == 2


@given(st.integers(0, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_the_tail_is_scipys(n: int, data: st.DataObject) -> None:
    ones = data.draw(st.integers(0, n))
    assert tail_of_binomial(ones, n) == pytest.approx(stats.binom.sf(ones - 1, n, 0.5), rel=1e-9)


def test_the_score_is_the_one_computed_by_hand() -> None:
    pairs = [(f"a{index}", f"b{index}") for index in range(40)]
    ones = sum(word_bit(KEY, *pair) for pair in pairs)
    found = count_bits([*pairs, *pairs[:10]], KEY)
    assert (found.n, found.ones) == (40, ones)
    assert found.z == pytest.approx((ones - 20) / math.sqrt(10))
    assert count_bits([*pairs, *pairs[:10]], KEY, distinct=False).n == 50


def test_without_a_mark_p_values_are_as_they_should_be_and_repetition_would_spoil_them() -> None:
    rng = random.Random(1)
    texts = [[(rng.choice("abcdef") * 3, f"w{rng.randrange(40)}") for _ in range(300)] for _ in range(4)]
    keys = [rng.randbytes(16) for _ in range(250)]
    rejected = [count_bits(text, key, alpha=0.05).p_value <= 0.05 for text in texts for key in keys]
    repeated = [count_bits(text, key, distinct=False).p_value <= 0.05 for text in texts for key in keys]
    assert sum(rejected) / len(rejected) == pytest.approx(0.05, abs=0.022)
    assert sum(repeated) / len(repeated) > 0.07


def test_few_words_never_get_a_verdict() -> None:
    pairs = [pair for pair in ((f"a{i}", f"b{i}") for i in range(100)) if word_bit(KEY, *pair)][:19]
    found = count_bits(pairs, KEY)
    assert (found.verdict, found.ones, found.is_watermarked) == ("insufficient", 19, False)
    assert found.p_value == pytest.approx(2**-19)
    empty = count_bits([], KEY)
    assert (empty.verdict, empty.n, empty.z, empty.p_value) == ("insufficient", 0, 0.0, 1.0)


def total(slots: list[Slot], chosen: tuple[int, ...], nats_per_one: float) -> float:
    words = ["", *(slot.options[index].word for slot, index in zip(slots, chosen, strict=True))]
    worth = 0.0
    for index, slot in enumerate(slots):
        worth += word_bit(KEY, words[index], words[index + 1]) * slot.counts
        worth -= slot.options[chosen[index]].cost / nats_per_one
    return worth


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    slots = [
        Slot(
            (
                Option(f"w{i}", 0.0),
                *(Option(f"w{i}_{j}", rng.uniform(0, 3)) for j in range(rng.randrange(4))),
            ),
            rng.random() < 0.7,
        )
        for i in range(6)
    ]
    nats = rng.choice([0.5, 1.0, 4.0])
    best = max(
        total(slots, chosen, nats) for chosen in itertools.product(*(range(len(s.options)) for s in slots))
    )
    found = tuple(choose_words(slots, KEY, nats))
    assert total(slots, found, nats) == pytest.approx(best)


def test_nothing_is_changed_where_nothing_is_gained() -> None:
    slots = [Slot((Option("a", 0.0), Option("b", 0.5)), False)] * 3
    assert choose_words(slots, KEY, 1.0) == [0, 0, 0]
    assert choose_words([], KEY, 1.0) == []


@pytest.mark.parametrize(
    ("key", "alpha", "said"), [(b"short", 0.01, "16 bytes"), (KEY, 0.0, "alpha"), (KEY, 1.0, "alpha")]
)
def test_bad_input_is_refused(key: bytes, alpha: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        count_bits([("a", "b")], key, alpha=alpha)
    with pytest.raises(ConfigError, match="nats_per_one"):
        choose_words([], KEY, 0.0)
