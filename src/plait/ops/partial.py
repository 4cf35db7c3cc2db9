"""Attention over one part of the past, and the exact merge of such parts.

Shapes: the leading axes of `out` and `lse` agree; usually Q queries, H heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from plait.errors import ConfigError

__all__ = ["Partial", "empty_partial", "merge", "merge_all"]


class Partial(NamedTuple):
    """Attention of queries over one part of the past, always fp32.

    Attributes:
        out: (Q, H, D) softmax-weighted values of the part.
        lse: (Q, H) natural log of the sum of the exponentials of the part's scores.

    A part in which a query sees no token has `out = 0` and `lse = -inf`: the identity of `merge`.
    """

    out: Tensor
    lse: Tensor


def empty_partial(
    num_queries: int, num_heads: int, head_dim: int, device: torch.device | None = None
) -> Partial:
    """The identity of `merge`: no token seen by any query."""
    return Partial(
        torch.zeros(num_queries, num_heads, head_dim, device=device),
        torch.full((num_queries, num_heads), -math.inf, device=device),
    )


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint parts, from the attention over each.

    Exact up to fp32 rounding; commutative bit for bit, associative up to rounding. An empty part
    changes nothing, and two empty parts give an empty part, never NaN.
    """
    top = torch.maximum(a.lse, b.lse)
    # exp(-inf - -inf) is NaN: where both parts are empty, compare with 0 instead.
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    weight_a, weight_b = (a.lse - top).exp(), (b.lse - top).exp()
    total = weight_a + weight_b
    nothing = total == 0
    total = torch.where(nothing, torch.ones_like(total), total)
    out = (a.out * weight_a[..., None] + b.out * weight_b[..., None]) / total[..., None]
    return Partial(out, (top + total.log()).masked_fill(nothing, -math.inf))


def merge_all(parts: Iterable[Partial]) -> Partial:
    """Merge one or more disjoint parts, left to right.

    Raises:
        ConfigError: there is no part.
    """
    iterator = iter(parts)
    merged = next(iterator, None)
    if merged is None:
        raise ConfigError("merge_all takes at least one part. Got none; use empty_partial for no part.")
    for part in iterator:
        merged = merge(merged, part)
    return merged
