"""Attention of packed rows over the memories of one layer: every strand is visited, and the parts are merged.

Shapes: N packed rows, n rows of a segment, H query heads, G key/value heads, D head size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.memory.plan import Choice, Seen, Visit
from plait.memory.rows import Rows, Segment, check_pasts, turns_of
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
    merge,
    rotate,
)

if TYPE_CHECKING:
    from plait.memory.memory import Memory

__all__ = ["attend"]


def attend(memories: Sequence[Memory], q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Remember the rows of several sequences and answer their queries, in one layer.

    A strand that several sequences share, and see whole, is visited once with all their queries
    (Juravsky et al. 2024, arXiv:2402.05099); the parts are then merged for each sequence.

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

    # parts[s] holds segment s's partials in the order of its visits, whatever else is in the batch.
    parts: list[list[Partial | None]] = []
    visits_of: list[list[Visit]] = []
    shared: dict[tuple[int, int | None], list[tuple[int, int, Visit]]] = {}
    for index, (memory, segment) in enumerate(zip(memories, rows.segments, strict=True)):
        visits = _resolved(memory.plan.policy.visits(memory, segment), partial(in_frame.at, segment))
        parts.append([None] * len(visits))
        visits_of.append(visits)
        for place, visit in enumerate(visits):
            shared.setdefault((id(visit.strand), visit.turned_at), []).append((index, place, visit))

    for visitors in shared.values():
        whole = [v for v in visitors if len(visitors) > 1 and _sees_all(rows.segments[v[0]], v[2])]
        if len(whole) > 1:
            visit = whole[0][2]
            queries = [in_frame.of_visit(visit, rows.segments[index]) for index, _, visit in whole]
            mask: Mask = Everything()
            if visit.strand.heads.bias is not None:
                mask = Placed(
                    mask, torch.cat([_places(visit, rows.segments[index]) for index, _, visit in whole])
                )
            stacked = _answer(visit, heads, torch.cat(queries), 0, mask)
            start = 0
            for (index, place, _), own in zip(whole, queries, strict=True):
                stop = start + len(own)
                part = Partial(stacked.out[start:stop], stacked.lse[start:stop])
                parts[index][place] = part
                start = stop
        for index, place, visit in visitors:
            if parts[index][place] is None:
                segment = rows.segments[index]
                parts[index][place] = _visit(visit, heads, segment, in_frame.of_visit(visit, segment))

    value_dim = v.shape[-1]
    outs = []
    for memory, segment, of_segment, visits in zip(memories, rows.segments, parts, visits_of, strict=True):
        new_empty = partial(empty_partial, num_heads=heads.num_heads, head_dim=value_dim, device=q.device)
        merged = _merged(of_segment, visits, segment.length, new_empty)
        if memory.watcher is not None:
            memory.watcher(memory, segment, visits, of_segment, merged)
        if memory.is_observed:
            own = in_frame.of_segment(segment, memory.tail.offset).detach().float()
            memory.observe(Seen(segment, rows.positions[segment.rows], own, merged.lse.detach()))
        outs.append(merged.out)
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_in_turns(
    memories: Sequence[Memory], q: Tensor, k: Tensor, v: Tensor, rows: Rows, runs: Sequence[Sequence[range]]
) -> Tensor:
    """`attend`, the first run of every segment first, then the second one, and so on."""
    turns = turns_of(rows, runs)
    outs = [
        attend([memories[index] for index in turn.segments], q[own], k[own], v[own], turn.rows)
        for turn in turns
        for own in [turn.chosen]
    ]
    return torch.cat(outs)[torch.cat([turn.chosen for turn in turns]).argsort()]


def _resolved(looks: Sequence[Visit | Choice], queries: Callable[[int], Tensor]) -> list[Visit]:
    """Visits, with choices made by the queries as if they stood at a given position."""
    visits: list[Visit] = []
    for look in looks:
        visits += look.choose(queries) if isinstance(look, Choice) else [look]
    return visits


def _visit(visit: Visit, heads: Heads, segment: Segment, queries: Tensor) -> Partial:
    """The part that a segment's visiting queries (n, H, D) see of a strand."""
    mask, first_query = visit.mask or segment.mask, segment.position
    if visit.queries is not None:
        if type(mask) in (Causal, Everything):
            # These know nothing but where the first query stands.
            first_query += visit.queries.start
        else:
            mask = SomeQueries(mask, visit.queries, segment.length)
    if visit.turned_at is not None and visit.strand.heads.bias is not None:
        mask = Placed(mask, _places(visit, segment) - first_query)
    return _answer(visit, heads, queries, first_query, mask, visit.window)


def _answer(
    visit: Visit, heads: Heads, queries: Tensor, first_query: int, mask: Mask, window: int | None = None
) -> Partial:
    """The part that queries see of a strand, with the bias of a layer's heads for keys that stand nowhere."""
    part = visit.strand.attend(queries, first_query, mask, window)
    if heads.bias is None or visit.strand.heads.bias is not None:
        return part
    assert visit.turned_at is not None, "keys that are not turned are visited at a distance"
    return Partial(part.out, part.lse + heads.bias.at(visit.turned_at).to(part.lse.device))


def _places(visit: Visit, segment: Segment) -> Tensor:
    """Sequence positions (n,) at which a segment's visiting queries stand for the keys of a strand."""
    queries = range(segment.length) if visit.queries is None else visit.queries
    if visit.turned_at is not None:
        return torch.full((len(queries),), visit.strand.offset + visit.turned_at)
    return segment.position + segment.mask.depths(segment.length)[queries.start : queries.stop]


def _merged(
    parts: Sequence[Partial | None], visits: Sequence[Visit], length: int, new_empty: Callable[[int], Partial]
) -> Partial:
    """Merge the parts of a segment in the order of its visits; some are of a run of its queries only.

    Nothing is written to in place, so that gradients flow and parts that others see stay as they are.
    """
    runs = [range(length) if visit.queries is None else visit.queries for visit in visits]
    borders = sorted({0, length, *(edge for run in runs for edge in (run.start, run.stop))})
    number_of = {border: number for number, border in enumerate(borders)}
    # One for each stretch of queries between two borders.
    merged: list[Partial | None] = [None] * (len(borders) - 1)
    for part, visit, run in zip(parts, visits, runs, strict=True):
        assert part is not None
        if visit.log_weight:
            part = Partial(part.out, part.lse + visit.log_weight)
        for number in range(number_of[run.start], number_of[run.stop]):
            low, high = borders[number] - run.start, borders[number + 1] - run.start
            own = part if high - low == len(run) else Partial(part.out[low:high], part.lse[low:high])
            before = merged[number]
            merged[number] = own if before is None else merge(before, own)
    whole = [
        new_empty(high - low) if one is None else one
        for one, (low, high) in zip(merged, pairwise(borders), strict=True)
    ]
    if len(whole) < 2:
        return whole[0] if whole else new_empty(0)
    return Partial(torch.cat([one.out for one in whole]), torch.cat([one.lse for one in whole]))


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

    def of_visit(self, visit: Visit, segment: Segment) -> Tensor:
        """The queries of a segment that make a visit, rotated for it."""
        if visit.turned_at is None:
            turned = self.of_segment(segment, visit.strand.offset)
        else:
            turned = self.at(segment, visit.turned_at)
        if visit.queries is None:
            return turned
        return turned[visit.queries.start : visit.queries.stop]

    def at(self, segment: Segment, position: int) -> Tensor:
        """The queries of a segment, (n, H, D), as if all of them stood at one frame position."""
        if self.heads.rope is None:
            return self.q[segment.rows]
        if position not in self.pinned:
            self.pinned[position] = rotate(self.q, self.rows.angles_at(self.heads.rope, position))
        return self.pinned[position][segment.rows]

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


def _sees_all(segment: Segment, visit: Visit) -> bool:
    """Whether every visiting query sees every key of the strand."""
    strand = visit.strand
    queries = visit.queries or range(segment.length)
    mask = visit.mask or segment.mask
    view = mask.view(segment.position, queries, strand.position, len(strand), visit.window)
    return view.visible is None and view.low == 0 and view.high == len(strand)
