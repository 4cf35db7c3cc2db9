"""Attention of packed rows over the memories of one layer: every strand is visited, and the parts are merged.

Shapes: N packed rows, n rows of a segment, H query heads, G key/value heads, D head size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.memory import side_by_side
from plait.memory.parts import Parts, Run, Visitor, part_of, rows_of
from plait.memory.plan import Choice, Seen, Visit
from plait.memory.rows import Rows, Segment, check_pasts, in_order, turns_of
from plait.memory.strand import Heads
from plait.ops import (
    Causal,
    Everything,
    Mask,
    Partial,
    Placed,
    SomeQueries,
    Tree,
    empty_partial,
    rotate,
)

if TYPE_CHECKING:
    from plait.memory.memory import Memory

__all__ = ["attend"]


def attend(memories: Sequence[Memory], q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Remember the rows of several sequences and answer their queries, in one layer.

    A strand that several sequences share, and see whole, is visited once with all their queries
    (Juravsky et al. 2024, arXiv:2402.05099), and their own short strands are visited side by side; the parts
    are then merged for each sequence.

    Args:
        memories: one for each segment of `rows`, all of one layer.
        q: (N, H, D), not rotated.
        k: (N, G, D), not rotated.
        v: (N, G, V).
        rows: which segment and position each row belongs to.

    Returns:
        (N, H, V) fp32.

    Raises:
        ConfigError: shapes that are not those of the layer, or rows that do not continue their memory;
            nothing is written then.
    """
    check_pasts(rows, memories)
    if not memories:
        return q.new_zeros(0, q.shape[1], v.shape[-1])
    heads = memories[0].heads
    _check_shapes(heads, q, k, v, rows)
    drafts = [segment.mask if isinstance(segment.mask, Tree) else None for segment in rows.segments]
    for memory, draft in zip(memories, drafts, strict=True):
        memory.check_append(draft)
    runs = [m.plan.policy.runs(segment) for m, segment in zip(memories, rows.segments, strict=True)]
    if any(len(of_segment) > 1 for of_segment in runs):
        return _attend_in_turns(memories, q, k, v, rows, runs)
    in_frame = _Frames(heads, q, rows)
    keys = in_frame.of_keys(k, [memory.tail.offset for memory in memories])
    for memory, segment, draft in zip(memories, rows.segments, drafts, strict=True):
        memory.append(keys[segment.rows], v[segment.rows], draft)

    visits: list[list[Visit]] = []
    strangers: dict[tuple[int, int | None], list[Visitor]] = {}
    for index, (memory, segment) in enumerate(zip(memories, rows.segments, strict=True)):
        visits.append(_resolved(memory.plan.policy.visits(memory, segment), partial(in_frame.at, segment)))
        for place, visit in enumerate(visits[index]):
            visitor = Visitor(index, place, segment, visit)
            strangers.setdefault((id(visit.strand), visit.turned_at), []).append(visitor)

    new_empty = partial(empty_partial, num_heads=heads.num_heads, head_dim=v.shape[-1], device=q.device)
    parts = Parts(rows.segments, visits, new_empty)
    alone: list[Visitor] = []
    families: dict[int, int] = {}
    for visitors in strangers.values():
        whole = [one for one in visitors if len(visitors) > 1 and _sees_all(one)]
        if len(whole) < 2:
            alone += visitors
            continue
        for one in whole:
            families.setdefault(one.number, id(one.visit.strand))
        parts.put(whole, _stacked(whole, heads, in_frame.of_visitors(whole)))
        alone += [one for one in visitors if not parts.has(one)]
    for group in side_by_side.alike(heads, alone, families):
        parts.put(group, side_by_side.attend_side_by_side(group, in_frame.of_visitors(group), _seen))
    for visitor in alone:
        if not parts.has(visitor):
            parts.put([visitor], _visit(visitor, heads, in_frame.of_visitors([visitor])))

    merged = parts.merged()
    for index, (memory, segment, run) in enumerate(zip(memories, rows.segments, merged, strict=True)):
        if memory.watcher is not None:
            memory.watcher(memory, segment, visits[index], parts.of(index), part_of([run]))
        if memory.is_observed:
            own = in_frame.of_segment(segment, memory.tail.offset).detach().float()
            lse = part_of([run]).lse.detach()
            memory.observe(Seen(segment, rows.positions[segment.rows], own, lse))
    return rows_of([Run(part.out, start, stop) for part, start, stop in merged])


def _attend_in_turns(
    memories: Sequence[Memory], q: Tensor, k: Tensor, v: Tensor, rows: Rows, runs: Sequence[Sequence[range]]
) -> Tensor:
    """`attend`, the first run of every segment first, then the second one, and so on."""
    turns = turns_of(rows, runs)
    outs = []
    for segments, own, own_rows in turns:
        outs.append(attend([memories[index] for index in segments], q[own], k[own], v[own], own_rows))
    return in_order(turns, outs)


def _resolved(looks: Sequence[Visit | Choice], queries: Callable[[int], Tensor]) -> list[Visit]:
    """Visits, with choices made by the queries as if they stood at a given position."""
    visits: list[Visit] = []
    for look in looks:
        visits += look.choose(queries) if isinstance(look, Choice) else [look]
    return visits


def _stacked(visitors: Sequence[Visitor], heads: Heads, queries: Tensor) -> Partial:
    """The part that the queries of several segments see of one strand, all of it."""
    visit = visitors[0].visit
    mask: Mask = Everything()
    if visit.strand.heads.bias is not None:
        mask = Placed(mask, torch.cat([_places(visitor) for visitor in visitors]))
    return _answer(visit, heads, queries, 0, mask)


def _visit(visitor: Visitor, heads: Heads, queries: Tensor) -> Partial:
    """The part that a segment's visiting queries (n, H, D) see of a strand."""
    visit = visitor.visit
    mask, first_query = _seen(visitor)
    if visit.turned_at is not None and visit.strand.heads.bias is not None:
        mask = Placed(mask, _places(visitor) - first_query)
    return _answer(visit, heads, queries, first_query, mask, visit.window)


def _seen(visitor: Visitor) -> tuple[Mask, int]:
    """What a segment's visiting queries see, and the position of the first of them."""
    segment, queries = visitor.segment, visitor.visit.queries
    mask = visitor.visit.mask or segment.mask
    if queries is None:
        return mask, segment.position
    if type(mask) in (Causal, Everything):
        # These know nothing but where the first query stands.
        return mask, segment.position + queries.start
    return SomeQueries(mask, queries, segment.length), segment.position


def _answer(
    visit: Visit, heads: Heads, queries: Tensor, first_query: int, mask: Mask, window: int | None = None
) -> Partial:
    """The part that queries see of a strand, with the bias of a layer's heads for keys that stand nowhere."""
    part = visit.strand.attend(queries, first_query, mask, window)
    if heads.bias is None or visit.strand.heads.bias is not None:
        return part
    assert visit.turned_at is not None, "keys that are not turned are visited at a distance"
    return Partial(part.out, part.lse + heads.bias.at(visit.turned_at).to(part.lse.device))


def _places(visitor: Visitor) -> Tensor:
    """Sequence positions (n,) at which a segment's visiting queries stand for the keys of a strand."""
    segment, visit, queries = visitor.segment, visitor.visit, visitor.queries
    if visit.turned_at is not None:
        return torch.full((len(queries),), visit.strand.offset + visit.turned_at)
    return segment.position + segment.mask.depths(segment.length)[queries.start : queries.stop]


class _Frames:
    """The queries of one layer, rotated once for each frame, and each pinned position, that is visited."""

    def __init__(self, heads: Heads, q: Tensor, rows: Rows) -> None:
        self.heads, self.q, self.rows = heads, q, rows
        self.rotated: dict[int, Tensor] = {}
        self.pinned: dict[int, Tensor] = {}

    def of_keys(self, k: Tensor, offsets: Sequence[int]) -> Tensor:
        """The keys of all rows, those of each segment in the frame that starts at its offset."""
        if self.heads.rope is None:
            return k
        angles = self.rows.angles(self.heads.rope, offsets)
        if len(set(offsets)) > 1 or self.q.dtype != k.dtype:
            return rotate(k, angles)
        # One frame for all, which the queries visit too: they turn together.
        turned = rotate(torch.cat([self.q, k], dim=1), angles)
        self.rotated[offsets[0]], keys = turned.split([self.q.shape[1], k.shape[1]], dim=1)
        return keys

    def of_segment(self, segment: Segment, offset: int) -> Tensor:
        """The queries of a segment, (n, H, D), at their positions in a frame that starts at `offset`."""
        return self(offset)[segment.rows]

    def of_visitors(self, visitors: Sequence[Visitor]) -> Tensor:
        """The queries of some visitors (n, H, D), one behind the other, each rotated for its visit."""
        runs = []
        for _, _, segment, visit in visitors:
            pinned = visit.turned_at
            turned = self(visit.strand.offset) if pinned is None else self._pinned_at(pinned)
            start, stop = segment.start, segment.start + segment.length
            if visit.queries is not None:
                start, stop = segment.start + visit.queries.start, segment.start + visit.queries.stop
            runs.append(Run(turned, start, stop))
        return rows_of(runs)

    def at(self, segment: Segment, position: int) -> Tensor:
        """The queries of a segment, (n, H, D), as if all of them stood at one frame position."""
        return self._pinned_at(position)[segment.rows]

    def _pinned_at(self, position: int) -> Tensor:
        if self.heads.rope is None:
            return self.q
        if position not in self.pinned:
            self.pinned[position] = rotate(self.q, self.rows.angles_at(self.heads.rope, position))
        return self.pinned[position]

    def __call__(self, offset: int) -> Tensor:
        if self.heads.rope is None:
            return self.q
        if offset not in self.rotated:
            angles = self.rows.angles(self.heads.rope, [offset] * len(self.rows.segments))
            self.rotated[offset] = rotate(self.q, angles)
        return self.rotated[offset]


def _check_shapes(heads: Heads, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> None:
    value_dim = heads.value_dim or heads.head_dim
    wanted = {
        "q": (len(rows), heads.num_heads, heads.head_dim),
        "k": (len(rows), heads.num_kv_heads, heads.head_dim),
        "v": (len(rows), heads.num_kv_heads, value_dim),
    }
    for (name, shape), given in zip(wanted.items(), (q, k, v), strict=True):
        if tuple(given.shape) != shape:
            raise ConfigError(
                f"attend takes {name} of shape {shape}: rows, heads, head size. Got {tuple(given.shape)}."
            )


def _sees_all(visitor: Visitor) -> bool:
    """Whether every visiting query sees every key of the strand."""
    segment, visit = visitor.segment, visitor.visit
    strand, mask = visit.strand, visit.mask or segment.mask
    view = mask.view(segment.position, visitor.queries, strand.position, len(strand), visit.window)
    return view.visible is None and view.low == 0 and view.high == len(strand)
