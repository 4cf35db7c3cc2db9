"""Which keys a query may see, as structure rather than as a table of booleans.

A mask speaks of the queries of one *segment* (a run of rows of one sequence) and the keys of one
strand. Packed batches need no mask of their own: each segment visits only its own strands, so a
packed batch is block-diagonal by construction.

Shapes: Q queries, T keys. Distances and windows are counted in positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from plait.errors import ConfigError

__all__ = ["Causal", "Everything", "Far", "Mask", "Placed", "SomeQueries", "Tree", "View"]


class View(NamedTuple):
    """What a block of queries sees of a strand.

    Attributes:
        low, high: key indices outside [low, high) are seen by none of the queries.
        visible: (queries, high - low) bool, or None when every query sees every key in the range.
    """

    low: int
    high: int
    visible: Tensor | None


class Mask:
    """Which keys each query of a segment may see."""

    def depths(self, num_queries: int) -> Tensor:
        """How many positions each query stands behind the segment's first query, (Q,) int64.

        Raises:
            ConfigError: the mask was made for another number of queries.
        """
        return torch.arange(num_queries)

    def positions(self, first_query: int, queries: range) -> Tensor:
        """Where a block of the segment's queries stands, (queries,) int64; see `view`."""
        return torch.arange(first_query + queries.start, first_query + queries.stop)

    def key_positions(self, first_query: int, first_key: int, keys: range) -> Tensor:
        """Where some of a strand's keys stand, (keys,) int64; see `view`.

        Args:
            keys: indices within the strand.
        """
        return torch.arange(first_key + keys.start, first_key + keys.stop)

    def distances(self, first_query: int, queries: range, first_key: int, keys: range) -> Tensor:
        """Positions from each key (column) up to each query (row), (queries, keys) int64."""
        rows = self.positions(first_query, queries)
        return rows[:, None] - self.key_positions(first_query, first_key, keys)

    def view(
        self,
        first_query: int,
        queries: range,
        first_key: int,
        num_keys: int,
        window: int | None = None,
        device: torch.device | None = None,
    ) -> View:
        """The part of a strand that a block of the segment's queries sees.

        Args:
            first_query: position of the segment's first query.
            queries: indices, within the segment, of the block's queries.
            first_key, num_keys: position of the strand's first key, and how many keys it has.
            window: a key `window` or more positions before a query is hidden; None for no limit.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Everything(Mask):
    """Every query sees every key, as in a bidirectional encoder; a window counts in both directions."""

    def view(
        self,
        first_query: int,
        queries: range,
        first_key: int,
        num_keys: int,
        window: int | None = None,
        device: torch.device | None = None,
    ) -> View:
        if window is None:
            return View(0, num_keys, None)
        distance = self.distances(first_query, queries, first_key, range(num_keys))
        return View(0, num_keys, (distance.abs() < window).to(device))


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees itself and what came before it."""

    def view(
        self,
        first_query: int,
        queries: range,
        first_key: int,
        num_keys: int,
        window: int | None = None,
        device: torch.device | None = None,
    ) -> View:
        first, last = first_query + queries.start - first_key, first_query + queries.stop - 1 - first_key
        high = min(max(last + 1, 0), num_keys)
        low = 0 if window is None else min(max(first - window + 1, 0), high)
        if high - 1 <= first and (window is None or last - low < window):
            return View(low, high, None)
        distance = self.distances(first_query, queries, first_key, range(low, high))
        seen = distance >= 0
        return View(low, high, (seen if window is None else seen & (distance < window)).to(device))


@dataclass(frozen=True)
class Tree(Mask):
    """Queries are the nodes of a draft tree: a node sees the past, its ancestors and itself.

    Node i stands at the position of the root plus its depth; siblings share a position. The nodes'
    keys are the last rows of the strand they were written to, in the order of the nodes.

    Args:
        parents: parent of each node, with `parents[0] == -1` and `parents[i] < i`.

    Raises:
        ConfigError: a parent does not come before its child.
    """

    parents: tuple[int, ...]

    def __init__(self, parents: Sequence[int]) -> None:
        object.__setattr__(self, "parents", tuple(int(parent) for parent in parents))
        for node, parent in enumerate(self.parents):
            if (node == 0) != (parent == -1) or not -1 <= parent < max(node, 1):
                raise ConfigError(
                    "Tree.parents must start with -1 and name an earlier node for each other one. "
                    f"Got parent {parent} for node {node}."
                )

    @cached_property
    def ancestors(self) -> Tensor:
        """(n, n) bool: column j is an ancestor of row i, or i itself."""
        table = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            table[node] |= table[parent]
        return table

    @cached_property
    def _depths(self) -> Tensor:
        return self.ancestors.sum(dim=1) - 1

    def depths(self, num_queries: int) -> Tensor:
        if num_queries != len(self.parents):
            raise ConfigError(
                f"A tree of {len(self.parents)} nodes needs as many rows. Got a segment of {num_queries}."
            )
        return self._depths

    def positions(self, first_query: int, queries: range) -> Tensor:
        return first_query + self._depths[queries.start : queries.stop]

    def key_positions(self, first_query: int, first_key: int, keys: range) -> Tensor:
        rows = torch.arange(first_key + keys.start, first_key + keys.stop)
        nodes = (rows - first_query).clamp(0, len(self.parents) - 1)
        return torch.where(rows < first_query, rows, first_query + self._depths[nodes])

    def view(
        self,
        first_query: int,
        queries: range,
        first_key: int,
        num_keys: int,
        window: int | None = None,
        device: torch.device | None = None,
    ) -> View:
        block = slice(queries.start, queries.stop)
        depths = self._depths[block]
        num_past = min(max(first_query - first_key, 0), num_keys)
        if window is None:
            past = torch.ones(len(queries), num_past, dtype=torch.bool)
        else:
            past = first_query + depths[:, None] - first_key - torch.arange(num_past) < window
        # Columns from here on are nodes: those that this strand holds, which may be some of them.
        first_node = max(first_key - first_query, 0)
        held = slice(first_node, first_node + num_keys - num_past)
        nodes = self.ancestors[block, held]
        if window is not None:
            nodes = nodes & (depths[:, None] - self._depths[held] < window)
        visible = torch.cat([past, nodes], dim=1)
        return View(0, num_keys, None if bool(visible.all()) else visible.to(device))


@dataclass(frozen=True, eq=False)
class _Over(Mask):
    """A mask that answers as another one but for what it says itself."""

    base: Mask

    def depths(self, num_queries: int) -> Tensor:
        return self.base.depths(num_queries)

    def positions(self, first_query: int, queries: range) -> Tensor:
        return self.base.positions(first_query, queries)

    def key_positions(self, first_query: int, first_key: int, keys: range) -> Tensor:
        return self.base.key_positions(first_query, first_key, keys)

    def view(
        self,
        first_query: int,
        queries: range,
        first_key: int,
        num_keys: int,
        window: int | None = None,
        device: torch.device | None = None,
    ) -> View:
        return self.base.view(first_query, queries, first_key, num_keys, window, device)


@dataclass(frozen=True)
class Far(_Over):
    """A query sees, of what it sees under another mask, the keys at least `distance` positions before it.

    Args:
        base: the segment's own mask, which knows where each query stands.
        distance: positions from a key up to a query that sees it, from 1 on.
        num_queries: queries of the segment.
    """

    distance: int
    num_queries: int

    def view(
        self,
        first_query: int,
        queries: range,
        first_key: int,
        num_keys: int,
        window: int | None = None,
        device: torch.device | None = None,
    ) -> View:
        nearest = int(self.positions(first_query, queries).max()) - self.distance
        if nearest < first_query:
            # Only the past is far enough, so that later keys need not be looked at.
            num_keys = min(num_keys, max(nearest - first_key + 1, 0))
        low, high, visible = self.base.view(first_query, queries, first_key, num_keys, window)
        seen = self.distances(first_query, queries, first_key, range(low, high)) >= self.distance
        if visible is not None:
            seen &= visible
        return View(low, high, None if bool(seen.all()) else seen.to(device))


@dataclass(frozen=True)
class SomeQueries(_Over):
    """A few of a segment's queries, seeing what they see in the whole segment.

    Args:
        base: the mask of the segment.
        chosen: indices of the queries within the segment, one after the other.
        num_queries: queries of the segment.
    """

    chosen: range
    num_queries: int

    def depths(self, num_queries: int) -> Tensor:
        return self.base.depths(self.num_queries)[self.chosen.start : self.chosen.stop]

    def positions(self, first_query: int, queries: range) -> Tensor:
        return self.base.positions(first_query, self.chosen[queries.start : queries.stop])

    def view(
        self,
        first_query: int,
        queries: range,
        first_key: int,
        num_keys: int,
        window: int | None = None,
        device: torch.device | None = None,
    ) -> View:
        block = self.chosen[queries.start : queries.stop]
        return self.base.view(first_query, block, first_key, num_keys, window, device)


@dataclass(frozen=True, eq=False)
class Placed(_Over):
    """Queries that see what they see under another mask, while distances are counted from other places.

    Args:
        base: what is seen, and where keys stand.
        places: (Q,) int64, where each query stands, counted from the first query's position.
    """

    places: Tensor

    def positions(self, first_query: int, queries: range) -> Tensor:
        return first_query + self.places[queries.start : queries.stop]
