"""Counter-based random streams: the right bits, uniform, independent, and never silently different."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.decode import Streams
from plait.errors import ConfigError

WORD = 2**64 - 1
words = st.integers(0, WORD)
purposes = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)

# Critical values at p = 1e-3: sqrt(n) times the Kolmogorov-Smirnov distance, and a standard normal, two-sided.
KOLMOGOROV = 1.95
NORMAL = 3.29


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64 with 10 rounds in plain Python, from the paper's definition."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return [c0, c1, c2, c3]


def kolmogorov(sample: npt.NDArray[np.float64]) -> float:
    """sqrt(n) times the largest distance between the sample's distribution and the uniform one."""
    n = len(sample)
    ordered = np.sort(sample)
    above = np.arange(1, n + 1) / n - ordered
    below = ordered - np.arange(n) / n
    return math.sqrt(n) * float(max(above.max(), below.max()))


def correlation(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Correlation in standard deviations of that of independent samples."""
    return float(np.corrcoef(first, second)[0, 1]) * math.sqrt(len(first))


def test_the_reference_generator_gives_the_published_known_answers() -> None:
    # Random123, kat_vectors: philox4x64 10, counter and key 0.
    assert philox([0, 0, 0, 0], [0, 0]) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@given(seed=words, branch=words, position=words, round=words, purpose=purposes)
def test_every_number_is_philox_of_its_key(
    seed: int, branch: int, position: int, round: int, purpose: str
) -> None:
    purpose_word = sum(ord(letter) << (8 * i) for i, letter in enumerate(purpose))
    # numpy counts up before the first block, and `block` is the counter's lowest word.
    expected = [
        (word >> 11) / 2**53
        for block in (1, 2)
        for word in philox([block, position, round, purpose_word], [seed, branch])
    ]
    streams = Streams(seed, branch=branch)
    assert streams.uniform(position, round, purpose) == expected[0]
    assert streams.uniforms(8, position, round, purpose).tolist() == expected
    assert streams.uniforms(3, position, round, purpose).tolist() == expected[:3]


def test_golden_values_never_change() -> None:
    streams = Streams(7)
    assert [streams.uniform(position) for position in range(3)] == [
        0.4789568056531206,
        0.9408886768950031,
        0.2911857225022696,
    ]
    assert streams.uniform(0, 1) == 0.605289320717724
    assert streams.uniform(0, purpose="draft") == 0.8131093121173915
    assert Streams(7, branch=1).uniform(0) == 0.5991373853844288
    # Logarithms may differ in the last bit between platforms.
    np.testing.assert_allclose(streams.gumbel(3, 0), [1.57556937, 1.42217643, 5.47685007], rtol=1e-8)


def test_uniforms_are_uniform_along_every_part_of_the_key() -> None:
    n = 10_000
    streams = Streams(1)
    assert kolmogorov(np.array([streams.uniform(i) for i in range(n)])) < KOLMOGOROV
    assert kolmogorov(np.array([streams.uniform(5, i) for i in range(n)])) < KOLMOGOROV
    assert kolmogorov(np.array([Streams(i).uniform(0) for i in range(n)])) < KOLMOGOROV
    assert kolmogorov(np.array([Streams(0, branch=i).uniform(0) for i in range(n)])) < KOLMOGOROV
    assert kolmogorov(streams.uniforms(n, 0)) < KOLMOGOROV


def test_neighbouring_keys_are_uncorrelated() -> None:
    n = 10_000
    streams = Streams(2)
    verify = np.array([streams.uniform(i) for i in range(n + 1)])
    others = {
        "next position": verify[1:],
        "next round": np.array([streams.uniform(i, 1) for i in range(n)]),
        "other purpose": np.array([streams.uniform(i, purpose="draft") for i in range(n)]),
        "next seed": np.array([Streams(3).uniform(i) for i in range(n)]),
        "next branch": np.array([Streams(2, branch=1).uniform(i) for i in range(n)]),
        "next number of the call": np.array([streams.uniforms(2, i)[1] for i in range(n)]),
    }
    for what, other in others.items():
        assert abs(correlation(verify[:n], other)) < NORMAL, what
        # Rules out a shift or a reflection of the same numbers too.
        assert kolmogorov((verify[:n] + other) % 1.0) < KOLMOGOROV, what


def test_no_number_is_shared_between_keys() -> None:
    streams = Streams(4)
    drawn = [
        number
        for position in range(30)
        for round in range(10)
        for purpose in ("verify", "draft", "a", "b", "ab", "ba")
        for number in streams.uniforms(7, position, round, purpose).tolist()
    ]
    assert len(set(drawn)) == len(drawn)


def test_gumbel_numbers_are_finite_and_have_the_gumbel_law() -> None:
    sample = Streams(5).gumbel(20_000, 0)
    assert np.isfinite(sample).all()
    assert kolmogorov(np.exp(-np.exp(-sample))) < KOLMOGOROV


def test_extreme_bits_give_finite_gumbel_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = np.array([0, WORD], dtype=np.uint64)
    monkeypatch.setattr(Streams, "_words", lambda self, *key: extremes)
    assert np.isfinite(Streams(0).gumbel(2, 0)).all()
    assert Streams(0).uniforms(2, 0).tolist() == [0.0, 1 - 2**-53]


def test_fresh_seeds_differ_and_are_kept() -> None:
    streams = Streams()
    assert streams.seed != Streams().seed
    assert Streams(streams.seed).uniform(9) == streams.uniform(9)


@pytest.mark.parametrize("wrong", [-1, 2**64, 1.0, True, "1", None, float("nan")])
def test_a_key_outside_its_range_is_refused(wrong: Any) -> None:
    streams = Streams(0)
    with pytest.raises(ConfigError, match=r"^A random stream's position must be .* Got "):
        streams.uniform(wrong)
    with pytest.raises(ConfigError, match=r"^A random stream's round must be .* Got "):
        streams.uniform(0, wrong)
    with pytest.raises(ConfigError, match=r"^A random stream's branch must be .* Got "):
        Streams(0, branch=wrong)


@pytest.mark.parametrize("wrong", ["", "Verify", "tree verify", "verify1", "ninechars", "é", "a\0"])
def test_a_purpose_that_is_not_a_short_word_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"^A purpose must be one to eight lower-case letters"):
        Streams(0).uniform(0, purpose=wrong)
