"""Attention by the book, in float64, one query and one head at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plait.ops import Partial

# Sums of a few dozen fp32 products of numbers near 1.
FP32_TOLERANCE = 1e-5


def brute_force(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    softcap: float | None = None,
    added: Tensor | None = None,
) -> Partial:
    """What `partial_attention` promises: q (Q, H, D), keys (G, T, D), values (G, T, V), visible (Q, T).

    `added` (H, Q, T) is added to the scores.
    """
    num_queries, num_heads, _ = q.shape
    num_kv_heads, num_keys, value_dim = values.shape
    out = torch.zeros(num_queries, num_heads, value_dim, dtype=torch.float64)
    lse = torch.full((num_queries, num_heads), -math.inf, dtype=torch.float64)
    for row in range(num_queries):
        seen = [t for t in range(num_keys) if visible is None or bool(visible[row, t])]
        for head in range(num_heads):
            if not seen:
                continue
            group = head // (num_heads // num_kv_heads)
            scores = keys[group, seen].double() @ q[row, head].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if added is not None:
                scores = scores + added[head, row, seen].double()
            out[row, head] = torch.softmax(scores, dim=0) @ values[group, seen].double()
            lse[row, head] = torch.logsumexp(scores, dim=0)
    return Partial(out, lse)


def assert_partials_close(given: Partial, wanted: Partial, tolerance: float = FP32_TOLERANCE) -> None:
    """Compare outputs and log-sum-exps; -inf must stand in the same places."""
    torch.testing.assert_close(given.out.double(), wanted.out.double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(given.lse.double(), wanted.lse.double(), atol=tolerance, rtol=tolerance)
