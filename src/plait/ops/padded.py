"""Attention of many sequences, each over keys of its own, as one product of padded keys; any device, differentiable.

Shapes: B sequences, n queries of each, T padded keys of each, H query heads, G key/value heads, R = H / G, D head size,
V value size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plait.ops.partial import Partial
from plait.ops.reference import capped, softmax_times

__all__ = ["padded", "padded_attention"]


def padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """Rows (G, T_i, D) of one dtype, with zeros behind them: (G, B, T, D) with T = `length`, at least every T_i."""
    if all(own.shape[1] == length for own in rows):
        return torch.stack(tuple(rows), dim=1)
    num_heads, _, dim = rows[0].shape
    zeros = rows[0].new_zeros(num_heads, length, dim)
    # Padding in between, so that one operation copies everything.
    pieces = [piece for own in rows for piece in (own, zeros[:, own.shape[1] :])]
    return torch.cat(pieces, dim=1).view(num_heads, len(rows), length, dim)


def padded_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Attention of every sequence's queries over its own keys, as a part that can be merged with others.

    As `reference.partial_attention` for each sequence by itself, up to rounding.

    Args:
        q: (B n, H, D), sequence by sequence.
        keys: (G, B, T, D) fp32, finite where nothing is visible.
        values: (G, B, T, V) fp32, finite where nothing is visible.
        visible: (B, n or 1, T) bool, which keys a query sees; every key when None. A query that sees none gets the
            empty part.
        scale: factor on the scores.
        softcap: c in `c * tanh(score / c)`, or None.

    Returns:
        `out` (B n, H, V) and `lse` (B n, H), fp32.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, count, length, value_dim = values.shape
    queries, group = num_rows // count, num_heads // num_kv_heads
    q_BnGRD = (q.float() * scale).view(count, queries, num_kv_heads, group, head_dim)
    q_SMD = q_BnGRD.permute(2, 0, 1, 3, 4).reshape(num_kv_heads * count, queries * group, head_dim)
    scores = capped(torch.bmm(q_SMD, keys.view(-1, length, head_dim).transpose(1, 2)), softcap)
    if visible is not None:
        shaped = scores.view(num_kv_heads, count, queries, group, length)
        scores = shaped.masked_fill(~visible[:, :, None], -math.inf).view_as(scores)
    out, lse = softmax_times(scores, values.view(-1, length, value_dim))
    out_GBnRV = out.view(num_kv_heads, count, queries, group, value_dim)
    lse_GBnR = lse.view(num_kv_heads, count, queries, group)
    return Partial(
        out_GBnRV.permute(1, 2, 0, 3, 4).reshape(num_rows, num_heads, value_dim),
        lse_GBnR.permute(1, 2, 0, 3).reshape(num_rows, num_heads),
    )
