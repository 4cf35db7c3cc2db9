"""Packing of lengths: every index once, no bin too full, and as few bins as promised."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import CapacityError, ConfigError
from plait.memory.arrangements import PackingMethod, pack, packing

METHODS: list[PackingMethod] = ["ffd", "bfd", "exact"]
lengths_of_few = st.lists(st.integers(0, 20), max_size=7)


def fewest(lengths: list[int], capacity: int) -> int:
    """By trying every assignment of lengths to bins."""
    for count in range(len(lengths) + 1):
        for choice in itertools.product(range(count), repeat=len(lengths)):
            loads = [0] * count
            for bin, length in zip(choice, lengths, strict=True):
                loads[bin] += length
            if max(loads, default=0) <= capacity:
                return count
    raise AssertionError


@settings(deadline=None)
@given(lengths=lengths_of_few, more=st.integers(0, 30))
def test_packing_keeps_its_promises(lengths: list[int], more: int) -> None:
    capacity = max(lengths, default=1) + more
    best = fewest(lengths, capacity)
    for method in METHODS:
        bins = pack(lengths, capacity, method)
        assert sorted(index for bin in bins for index in bin) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in bin) <= capacity for bin in bins)
        assert bins == sorted(sorted(bin) for bin in bins)
        assert len(bins) <= math.floor(11 / 9 * best + 6 / 9)
    assert len(pack(lengths, capacity, "exact")) == best


def test_the_exact_search_finds_what_the_greedy_ones_miss() -> None:
    lengths = [7, 6, 5, 5, 4, 3]
    # 7+3, 6+4, 5+5 fill three bins of 10; both greedy orders put 3 or 4 elsewhere for some capacities.
    hard = [44, 24, 24, 22, 21, 17, 8, 8, 6, 6]
    assert len(pack(lengths, 10, "exact")) == 3
    assert len(pack(hard, 61, "exact")) < len(pack(hard, 61, "ffd"))


def test_equal_lengths_are_plain_batches() -> None:
    for method in METHODS:
        assert pack([4] * 6, 8, method) == [[0, 1], [2, 3], [4, 5]]
    assert pack([], 8) == []


@pytest.mark.parametrize(
    ("lengths", "capacity", "method", "message"),
    [
        ([3, 9, 2], 8, "ffd", "capacity of 8. Length 1 is 9"),
        ([3, -1], 8, "bfd", "Length 1 is -1"),
        ([3], 8, "best", "ffd, bfd, exact"),
    ],
)
def test_what_does_not_fit_is_refused(
    lengths: list[int], capacity: int, method: PackingMethod, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(lengths, capacity, method)


def test_the_exact_search_gives_up_rather_than_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_MOST_PLACEMENTS", 5)
    with pytest.raises(CapacityError, match="ffd"):
        pack([44, 24, 24, 22, 21, 17, 8, 8, 6, 6], 61, "exact")
