"""The torch form of every primitive: any device, differentiable, and the definition of the native form.

Shapes: N rows, I inputs, O outputs; Q queries, T keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.distance_bias import DistanceBias
from plait.ops.masks import Everything, Mask
from plait.ops.partial import Partial, empty_partial

__all__ = ["activate", "capped", "layer_norm", "linear", "partial_attention", "rms_norm", "softmax_times"]

# Scores of one block of queries stay under this many numbers (32 MB), so that memory does not
# grow with the square of a prompt.
_SCORES_AT_ONCE = 8 * 1024 * 1024

# Where torch's own product of fp32 matrices leaves a CPU's speed unused, measured with 2 threads:
# - with AVX2, a few rows are faster with the factors exchanged: 0.4 to 0.9 of the time for 2 to 32 rows of matrices from
#   2^16 weights on, and 0.5 to 0.9 for a single row of up to 1,024 columns. With an Intel processor's AVX-512 this loses;
# - a single row is faster with oneDNN's product, which PyTorch itself uses for other types and in compiled programs:
#   0.4 to 0.7 of the time on an AMD EPYC, and closer to the exact product. For more rows it is as fast, but its
#   rounding is 2 to 4 times as large, and logits would leave the 1e-4 that they are promised to.
_onednn_linear = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
_EXCHANGE = torch.backends.cpu.get_cpu_capability() == "AVX2"
_FEW_ROWS = 32
_BIG_MATRIX = 1 << 16
_SHORT_ROW = 1024


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`: x (..., I), weight (O, I) -> (..., O) in x's dtype; multiplied in the weight's."""
    if x.dtype != weight.dtype:
        return linear(x.to(weight.dtype), weight).to(x.dtype)
    if weight.dtype == torch.float32 and weight.is_cpu:
        num_rows = x.numel() // max(1, weight.shape[1])
        if _EXCHANGE and _is_few(num_rows, weight):
            return _linear_of_few_rows(x.reshape(num_rows, -1), weight).view(*x.shape[:-1], -1)
        if num_rows == 1 and _onednn_linear is not None and not _needs_gradient(x, weight):
            product: Tensor = _onednn_linear(x, weight, None, "none", [], "")
            return product
    return F.linear(x, weight)


def _needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd would record an operation on these tensors; oneDNN's product has no gradient."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_few(num_rows: int, weight: Tensor) -> bool:
    """Whether a product of so few rows is faster with its factors exchanged."""
    if num_rows == 1:
        return weight.numel() >= _BIG_MATRIX and weight.shape[1] <= _SHORT_ROW
    return 1 < num_rows <= _FEW_ROWS and weight.numel() >= _BIG_MATRIX


def _linear_of_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` as `(weight @ x.T).T`, rows x (N, I): the matrix is the factor that threads divide up."""
    num_rows = x.shape[0]
    if num_rows == 1:
        # With one column it would be a matrix-vector product, which reads the matrix in one thread.
        x = torch.cat([x, x])
    return torch.mm(weight, x.t())[:, :num_rows].t().contiguous()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last axis."""
    # torch's own rms_norm takes three times as long on a CPU for the few rows of a decoding step.
    squares = x.square().sum(dim=-1, keepdim=True)
    # Their mean plus epsilon in one operation instead of four.
    return x * torch.rsub(squares, epsilon, alpha=-1 / x.shape[-1]).rsqrt() * weight


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """`(x - mean) / sqrt(variance + epsilon) * weight + bias` over the last axis."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply a named activation: `silu`, `gelu` (exact), `gelu_tanh` or `relu`."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def partial_attention(
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
) -> Partial:
    """Attention of every query over these keys, as a part that can be merged with others.

    Args:
        q: (Q, H, D) queries, H a multiple of G; head h reads key/value head h // (H / G).
        keys: (G, T, D), any floating dtype; T may be 0.
        values: (G, T, V), any floating dtype.
        scale: factor on the scores, usually D ** -0.5.
        mask: which keys a query sees; every key when left out. A query that sees none gets the empty part.
        first_query, first_key: positions of the first query and the first key, for the mask.
        window: a key this many positions or more before a query is hidden; None for no limit.
        softcap: c in `c * tanh(score / c)`, or None.
        bias: what is taken off the scores, capped ones too, by the distance that the mask knows; None for nothing.

    Returns:
        `out` (Q, H, V) and `lse` (Q, H), fp32.
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys, value_dim = values.shape
    if num_queries == 0 or num_keys == 0:
        return empty_partial(num_queries, num_heads, value_dim, q.device)
    group = num_heads // num_kv_heads
    q_GNQD = (q.float() * scale).view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    mask = mask or Everything()

    step = max(1, _SCORES_AT_ONCE // (num_heads * num_keys))
    parts = []
    for start in range(0, num_queries, step):
        block = range(start, min(start + step, num_queries))
        low, high, visible = mask.view(first_query, block, first_key, num_keys, window, q.device)
        rows = len(block)
        q_GMD = q_GNQD[:, :, start : start + rows].reshape(num_kv_heads, group * rows, head_dim)
        scores = torch.bmm(q_GMD, keys[:, low:high].float().transpose(1, 2))
        scores = scores.view(num_heads, rows, high - low)
        scores = capped(scores, softcap)
        if bias is not None:
            scores = bias.applied(scores, mask.distances(first_query, block, first_key, range(low, high)))
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        scores = scores.view(num_kv_heads, group * rows, high - low)
        out, lse = softmax_times(scores, values[:, low:high].float())
        parts.append((out.view(num_kv_heads, group, rows, value_dim), lse.view(num_kv_heads, group, rows)))
    out_GNQV, lse_GNQ = (
        parts[0] if len(parts) == 1 else (torch.cat(p, dim=2) for p in zip(*parts, strict=True))
    )
    return Partial(
        out_GNQV.permute(2, 0, 1, 3).reshape(num_queries, num_heads, value_dim),
        lse_GNQ.permute(2, 0, 1).reshape(num_queries, num_heads),
    )


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(scores / softcap)`; the scores themselves for None."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def softmax_times(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`softmax(scores) @ values` and the log-sum-exp; a row of -inf gives 0 and -inf."""
    if scores.shape[-1] == 0:
        return scores.new_zeros(*scores.shape[:-1], values.shape[-1]), scores.new_full(
            scores.shape[:-1], -math.inf
        )
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    out = torch.bmm(weights, values) / total
    return out, (top + total.log()).masked_fill(nothing, -math.inf).squeeze(-1)
