"""Where partial attention is computed: torch's fused kernel when it applies, else the reference."""

from __future__ import annotations

from typing import NotRequired, TypedDict, Unpack

from torch import Tensor

from plait.ops import reference
from plait.ops.distance_bias import DistanceBias
from plait.ops.fused import fused_attention
from plait.ops.masks import Mask
from plait.ops.partial import Partial

__all__ = ["AttentionOptions", "Scoring", "partial_attention"]


class Scoring(TypedDict):
    """How a query and a key that it sees are scored; see `reference.partial_attention`."""

    scale: float
    softcap: NotRequired[float | None]
    bias: NotRequired[DistanceBias | None]


class AttentionOptions(Scoring):
    """What every form of partial attention takes beside its tensors; see `reference.partial_attention`."""

    mask: NotRequired[Mask | None]
    first_query: NotRequired[int]
    first_key: NotRequired[int]
    window: NotRequired[int | None]


def partial_attention(
    q: Tensor, keys: Tensor, values: Tensor, **options: Unpack[AttentionOptions]
) -> Partial:
    """Attention of every query over these keys, as a part that can be merged with others.

    `reference.partial_attention` defines it and explains the options; results of the two forms agree
    to fp32 rounding.

    Args:
        q: (Q, H, D) queries, H a multiple of G; head h reads key/value head h // (H / G).
        keys: (G, T, D), any floating dtype; T may be 0.
        values: (G, T, V), any floating dtype.

    Returns:
        `out` (Q, H, V) and `lse` (Q, H), fp32.
    """
    part = fused_attention(q, keys, values, **options)
    return reference.partial_attention(q, keys, values, **options) if part is None else part
