"""Partial attention through torch's fused CPU kernel, for the cases that it covers.

The kernel is the one behind `scaled_dot_product_attention`; called directly it also returns the
log-sum-exp that merging needs.

Shapes: Q queries, T keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.distance_bias import DistanceBias
from plait.ops.masks import Causal, Everything, Mask
from plait.ops.partial import Partial, merge

__all__ = ["fused_attention"]


def fused_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    mask: Mask | None = None,
    first_query: int = 0,
    first_key: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    bias: DistanceBias | None = None,
) -> Partial | None:
    """As `reference.partial_attention`; None where the kernel does not apply.

    It applies to fp32 on a CPU without gradients, soft cap or bias, when every query sees every key, or
    when the queries are the last rows of the strand and see all that comes before them.
    """
    num_queries, num_keys = q.shape[0], keys.shape[1]
    if softcap is not None or bias is not None or not _is_plain(q, keys, values):
        return None
    if num_queries == 0 or num_keys == 0:
        return None
    mask = mask or Everything()
    low, high, visible = mask.view(first_query, range(num_queries), first_key, num_keys, window, q.device)
    if high == low:
        return None
    if visible is None:
        return _unmasked(q, keys[:, low:high], values[:, low:high], scale)
    num_past = num_keys - num_queries
    if type(mask) is not Causal or num_past < 0 or low > 0 or first_query - first_key != num_past:
        return None
    if window is not None and window < num_keys:
        return None
    own = _triangular(q, keys[:, num_past:], values[:, num_past:], scale)
    if num_past == 0:
        return own
    return merge(_unmasked(q, keys[:, :num_past], values[:, :num_past], scale), own)


def _is_plain(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    wants_gradient = torch.is_grad_enabled() and (
        q.requires_grad or keys.requires_grad or values.requires_grad
    )
    return (
        not wants_gradient
        and q.dtype == keys.dtype == values.dtype == torch.float32
        and q.is_cpu
        and q.shape[-1] == values.shape[-1]
        and q.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    )


def _unmasked(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """Every query sees every key: the query heads of a group are stacked as more queries."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    if num_queries == 1:
        out, lse = _kernel(q.view(1, num_kv_heads, group, head_dim), keys[None], values[None], scale=scale)
        return Partial(out.reshape(1, num_heads, head_dim), lse.reshape(1, num_heads))
    q_GMD = q.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    q_GMD = q_GMD.reshape(1, num_kv_heads, group * num_queries, head_dim)
    out, lse = _kernel(q_GMD, keys[None], values[None], scale=scale)
    out = out.view(num_kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3)
    lse = lse.view(num_kv_heads, group, num_queries).permute(2, 0, 1)
    return Partial(out.reshape(num_queries, num_heads, head_dim), lse.reshape(num_queries, num_heads))


def _triangular(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """Query i sees keys 0..i: one call for each query head of a group, so that keys are not copied."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[0]
    q_QGND = q.view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    parts = [
        _kernel(
            q_QGND[:, :, head].transpose(0, 1)[None], keys[None], values[None], is_causal=True, scale=scale
        )
        for head in range(q_QGND.shape[2])
    ]
    out = torch.stack([out[0].transpose(0, 1) for out, _ in parts], dim=2)
    lse = torch.stack([lse[0].transpose(0, 1) for _, lse in parts], dim=2)
    return Partial(out.view(num_queries, num_heads, head_dim), lse.view(num_queries, num_heads))


def _kernel(
    q: Tensor, keys: Tensor, values: Tensor, *, scale: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(1, G, M, D) and (1, G, T, D) -> (1, G, M, D) and log-sum-exp (1, G, M)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, is_causal=is_causal, scale=scale
    )
    return out, lse
