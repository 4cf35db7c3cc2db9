"""What one step did, for whoever wants to look: strands, where the last query looked, and the draft tree.

Nothing here runs for a request that is not traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from plait.decode.speculate import Tree
from plait.memory import Memory, Partial, Past, Rows, Segment, Strand, Visit, allocated_bytes
from plait.nn import Transformer

__all__ = ["DraftView", "StrandView", "Trace", "Tracer"]


class StrandView(NamedTuple):
    """Strands that hold the same tokens, one in each of some layers.

    Attributes are those at the time of the pass, when the tail held its rows too.

    Attributes:
        kind: how they are stored: `dense`, `frozen` (dense, and never written to again), `gear`, ...
        position: sequence position of the first token.
        tokens: how many there are.
        offset: where the strand's frame starts, in the first of those layers.
        layers: how many layers hold it.
        nbytes: bytes that it keeps allocated in all of them.
        weight: share of the last query's attention, in [0, 1], as a mean over all heads and layers; 0
            where it was not visited.
    """

    kind: str
    position: int
    tokens: int
    offset: int
    layers: int
    nbytes: int
    weight: float


class DraftView(NamedTuple):
    """A draft tree that was judged: tokens, parents (-1 for the root), and the nodes that were accepted."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    accepted: tuple[int, ...]


class Trace(NamedTuple):
    """What one step did to one sequence."""

    strands: tuple[StrandView, ...]
    draft: DraftView


class Tracer:
    """Looks at the memories of traced sequences.

    A native program does not tell what its queries visit, so behind its pass the newest token is asked once
    more, by the plain form of the model; that row is forgotten again. Where the plain form computes anyway,
    it is watched, since what policies learn from queries must not be learnt twice.

    Args:
        model: the transformer.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._plain: Transformer | None = None

    def watch(self, past: Past) -> None:
        """Note what the queries of the next pass visit, if its form can tell."""
        for layer in past.layers:
            if isinstance(layer, Memory):
                layer.watcher = _Watch()

    def trace(self, past: Past, tokens: Sequence[int], tree: Tree, path: Sequence[int], row: int) -> Trace:
        """What the pass that has just been settled did.

        Args:
            past: that of the sequence, after the commit.
            tokens: of the sequence.
            tree, path: what was guessed, and the nodes that were accepted.
            row: of the last accepted node, among the rows of the sequence in that pass.
        """
        if not any(_watch(layer).seen for layer in past.layers if isinstance(layer, Memory)):
            self._ask(past, tokens)
            row = 0
        memories = [layer for layer in past.layers if isinstance(layer, Memory)]
        found: dict[tuple[int, int], StrandView] = {}
        for memory in memories:
            for view in _watch(memory).views(row):
                key = (view.position, view.tokens)
                before = found.get(key) or view._replace(layers=0, nbytes=0, weight=0.0)
                found[key] = before._replace(
                    layers=before.layers + 1,
                    nbytes=before.nbytes + view.nbytes,
                    weight=before.weight + view.weight / len(memories),
                )
            memory.watcher = None
        draft = DraftView(tuple(tree.tokens), tuple(tree.parents), tuple(path))
        return Trace(tuple(found[key] for key in sorted(found)), draft)

    def _ask(self, past: Past, tokens: Sequence[int]) -> None:
        layers = past.layers
        if len(past) >= len(tokens) or any(isinstance(one, Memory) and one.is_observed for one in layers):
            return
        if self._plain is None:
            self._plain = self._model.with_blocks(range(len(self._model.config.blocks)))
        length = len(past)
        newest = torch.tensor(tokens[length : length + 1], dtype=torch.int64)
        try:
            self._plain(newest, Rows([(1, length)]), [past])
        finally:
            past.truncate(length)


class _Watch:
    """One layer in the last pass: the strands as they were then, and each row's share of attention in those visited."""

    def __init__(self) -> None:
        self.held: list[StrandView] = []
        self.seen: list[tuple[StrandView, range, list[float]]] = []
        self.rows = 0

    def __call__(
        self,
        memory: Memory,
        segment: Segment,
        visits: Sequence[Visit],
        parts: Sequence[Partial | None],
        merged: Partial,
    ) -> None:
        self.held = [_view(strand) for strand in memory.all_strands()]
        # A segment may come in turns, one run of rows after the other.
        first, self.rows = self.rows, self.rows + segment.length
        for visit, part in zip(visits, parts, strict=True):
            assert part is not None
            rows = visit.queries or range(segment.length)
            shares = (part.lse + visit.log_weight - merged.lse[rows.start : rows.stop]).exp()
            own = range(first + rows.start, first + rows.stop)
            self.seen.append((_view(visit.strand), own, shares.nan_to_num(0.0).mean(dim=-1).tolist()))

    def views(self, row: int) -> list[StrandView]:
        """Every strand, with the share of a row."""
        weights: dict[StrandView, float] = dict.fromkeys(self.held, 0.0)
        for view, rows, shares in self.seen:
            if row in rows:
                weights[view] = weights.get(view, 0.0) + shares[row - rows.start]
        return [view._replace(weight=weight) for view, weight in weights.items()]


def _watch(memory: Memory) -> _Watch:
    assert isinstance(memory.watcher, _Watch)
    return memory.watcher


def _view(strand: Strand) -> StrandView:
    kind = type(strand).__name__.removesuffix("Strand").lower()
    nbytes = allocated_bytes([strand])
    return StrandView(kind, strand.position, len(strand), strand.offset, 1, nbytes, 0.0)
