"""Visits of sequences that share a past, each to a short strand of its own: one product for all instead of one for each.

Most visits of a decoding step are of this kind: each sequence's last tokens. By themselves they are a few dozen keys
each, and a call costs more than what it computes.

Shapes: B visits, n queries of each, H query heads, D head size, T keys of the longest strand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from plait.memory.parts import Visitor
from plait.memory.strand import FrozenStrand, Heads
from plait.ops import Mask, Partial, View, padded, padded_attention
from plait.ops.native import is_everywhere

__all__ = ["alike", "attend_side_by_side"]

# Strands are copied next to each other; a longer one takes longer to copy than a visit of its own takes to start.
_LONGEST = 256
# Shorter ones are padded to this.
_SHORTEST = 32
# Of more queries a fused kernel makes better use.
_MOST_QUERIES = 16
# Two visits by themselves take fewer operations than copying, padding and masking.
_FEWEST = 3
# Numbers that are copied, and scores that are made, at a time (16 MB each), so that memory does not grow with the batch.
_NUMBERS_AT_ONCE = 4 * 1024 * 1024


def alike(heads: Heads, visitors: Iterable[Visitor], families: Mapping[int, int]) -> list[list[Visitor]]:
    """Of these visitors of a layer, those that go side by side with others, group by group.

    Args:
        families: of segments that visited a strand together, a number that all of them have. Only those go side by
            side: the bits of a sequence may depend on those that it shares a past with, and on no stranger.
    """
    groups: dict[Hashable, list[Visitor]] = {}
    if heads.bias is None and not is_everywhere():
        # A native operation gives a row the same bits whatever else is in the batch; torch's products do not.
        for visitor in visitors:
            if visitor.number in families and _is_short(visitor):
                groups.setdefault((families[visitor.number], *_kind(visitor)), []).append(visitor)
    pieces: list[list[Visitor]] = []
    for group in groups.values():
        step = _at_once(group[0])
        pieces += [group[start : start + step] for start in range(0, len(group) - _FEWEST + 1, step)]
    return pieces


def attend_side_by_side(
    visitors: Sequence[Visitor], queries: Tensor, mask_of: Callable[[Visitor], tuple[Mask, int]]
) -> Partial:
    """The part that each of a group of visitors sees of its strand, (B n) rows in their order.

    Args:
        queries: (B n, H, D), rotated for their visits, in the order of the visitors.
        mask_of: what a visitor's queries see, and the position of the first of them.
    """
    views: list[View] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    num_queries = len(visitors[0].queries)
    for visitor in visitors:
        strand = visitor.visit.strand
        assert isinstance(strand, FrozenStrand)
        mask, first_query = mask_of(visitor)
        view = mask.view(first_query, range(num_queries), strand.position, len(strand), visitor.visit.window)
        views.append(view)
        keys.append(strand.keys[:, view.low : view.high])
        values.append(strand.values[:, view.low : view.high])
    length = max(1, *(view.high - view.low for view in views))
    heads = visitors[0].visit.strand.heads
    return padded_attention(
        queries,
        padded(keys, length).float(),
        padded(values, length).float(),
        _visible(views, num_queries, length, queries.device),
        scale=heads.scale,
        softcap=heads.softcap,
    )


def _is_short(visitor: Visitor) -> bool:
    """Whether the visit is one of few queries to few plain numbers, scored by nothing but their products."""
    strand = visitor.visit.strand
    return (
        isinstance(strand, FrozenStrand)
        and type(strand).attend is FrozenStrand.attend
        and 0 < len(strand) <= _LONGEST
        and 0 < len(visitor.queries) <= _MOST_QUERIES
    )


def _kind(visitor: Visitor) -> tuple[Hashable, ...]:
    """What visits side by side have in common; padding at most doubles what is copied of all but the shortest."""
    strand = visitor.visit.strand
    assert isinstance(strand, FrozenStrand)
    return id(strand.heads), strand.keys.dtype, strand.keys.device, len(visitor.queries), _room(len(strand))


def _room(length: int) -> int:
    """The power of two, from 32 on, that holds a strand."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def _at_once(visitor: Visitor) -> int:
    """How many visits such as this one go side by side."""
    heads, length = visitor.visit.strand.heads, _room(len(visitor.visit.strand))
    copied = heads.num_kv_heads * length * (heads.head_dim + (heads.value_dim or heads.head_dim))
    return max(1, _NUMBERS_AT_ONCE // max(copied, heads.num_heads * length * len(visitor.queries)))


def _visible(views: Sequence[View], num_queries: int, length: int, device: torch.device) -> Tensor | None:
    """Which of the padded keys each query sees, (B, n or 1, T) bool; None for all."""
    lengths = [view.high - view.low for view in views]
    visible = None
    if min(lengths) < length:
        visible = (torch.arange(length) < torch.tensor(lengths)[:, None])[:, None]
    if any(view.visible is not None for view in views):
        if visible is None:
            visible = torch.ones(len(views), 1, length, dtype=torch.bool)
        visible = visible.repeat(1, num_queries, 1)
        for row, view, count in zip(visible, views, lengths, strict=True):
            if view.visible is not None:
                row[:, :count] = view.visible
    return None if visible is None else visible.to(device)
