"""Prepacking: sequences of uneven length side by side in few forward passes, without padding.

Source: Zhao et al. 2024, arXiv:2404.09529, section 3. Rows here are not padded, so a pass of several
sequences is one run of rows, each sequence seeing only itself (`plait.memory.Rows`); what is left of
the method is the choice of which sequences share a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from plait.errors import CapacityError, ConfigError

__all__ = ["PackingMethod", "pack"]

PackingMethod = Literal["ffd", "bfd", "exact"]

# Placements that the exact search tries before it gives up; some seconds.
_MOST_PLACEMENTS = 1_000_000


def pack(lengths: Sequence[int], capacity: int, method: PackingMethod = "ffd") -> list[list[int]]:
    """Put lengths into few bins.

    Args:
        lengths: in tokens, from 0 on.
        capacity: of every bin, in tokens.
        method: `ffd`, first fit decreasing: the longest first, each into the first bin with room; at most
            11/9 of the fewest bins, and 6/9 of one more. `bfd`, best fit decreasing: into the fullest bin with
            room; the same bound. `exact`: the fewest bins, in a time that can double with every length.

    Returns:
        Indices of `lengths`, each in one bin. Bins are in the order of their first index, and indices in a
        bin ascend, so that no sequence waits behind a whole bin of later ones.

    Raises:
        ConfigError: a length below 0 or above the capacity, or an unknown method.
        CapacityError: `exact` found no proof within a million placements.
    """
    if method not in get_args(PackingMethod):
        raise ConfigError(f"pack takes a method of {', '.join(get_args(PackingMethod))}. Got {method!r}.")
    for index, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ConfigError(
                f"pack takes lengths from 0 to the capacity of {capacity}. Length {index} is {length}."
            )
    if method == "exact":
        bins = _exact(lengths, capacity)
    elif method == "bfd":
        bins = _greedy(lengths, capacity, lambda rooms: min(rooms, key=lambda bin: rooms[bin]))
    else:
        bins = _greedy(lengths, capacity, min)
    return sorted(sorted(bin) for bin in bins)


def _greedy(
    lengths: Sequence[int], capacity: int, choose: Callable[[dict[int, int]], int]
) -> list[list[int]]:
    """The longest first, each into the bin that is chosen of those with room (bin to tokens of room)."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = {bin: room for bin, room in enumerate(rooms) if room >= lengths[index]}
        if not fitting:
            fitting = {len(bins): capacity}
            bins.append([])
            rooms.append(capacity)
        bin = choose(fitting)
        bins[bin].append(index)
        rooms[bin] -= lengths[index]
    return bins


def _exact(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The fewest bins: for each number of bins from the lower bound on, try all placements."""
    fallback = pack(lengths, capacity, "bfd")
    lower = -(-sum(lengths) // capacity) if capacity else len(fallback)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    placements = 0

    def place(at: int, rooms: list[int], bins: list[list[int]]) -> bool:
        nonlocal placements
        if at == len(order):
            return True
        tried = set()
        for bin, room in enumerate(rooms):
            # Bins with the same room are alike.
            if room < lengths[order[at]] or room in tried:
                continue
            tried.add(room)
            placements += 1
            if placements > _MOST_PLACEMENTS:
                raise CapacityError(
                    f"The fewest bins for {len(lengths)} lengths were not found in {_MOST_PLACEMENTS} placements. "
                    "Use method='ffd' or 'bfd'."
                )
            rooms[bin] -= lengths[order[at]]
            bins[bin].append(order[at])
            if place(at + 1, rooms, bins):
                return True
            rooms[bin] += lengths[order[at]]
            bins[bin].pop()
        return False

    for count in range(lower, len(fallback)):
        bins: list[list[int]] = [[] for _ in range(count)]
        if place(0, [capacity] * count, bins):
            return [bin for bin in bins if bin]
    return fallback
