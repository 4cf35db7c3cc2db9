"""Attention can be cut anywhere: parts of the past, merged, equal full attention.

Shapes: Q queries, T keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CLAIM"]


def _full_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Softmax attention in float64, written without the code that is being checked: (Q, H, D)."""
    import torch

    group = q.shape[1] // keys.shape[0]
    k_HTD, v_HTD = (x.double().repeat_interleave(group, dim=0) for x in (keys, values))
    weights = torch.softmax(torch.einsum("qhd,htd->qht", q.double(), k_HTD) * scale, dim=-1)
    return torch.einsum("qht,htd->qhd", weights, v_HTD)


def _measure(run: Run) -> Measurements:
    import torch

    from plait.ops import merge_all, partial_attention

    random = torch.Generator().manual_seed(run.seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    rounds = run.pick(1000, 40)
    errors: list[float] = []
    empty_parts = parts_seen = 0
    for number in range(rounds):
        if number % max(1, rounds // 10) == 0:
            yield f"{number} of {rounds} partitions"
        num_queries, num_keys, num_parts = draw(1, 8), draw(1, draw(1, 512)), draw(1, 12)
        num_kv_heads, group, head_dim = draw(1, 3), draw(1, 4), 8 * draw(1, 16)
        q = torch.randn(num_queries, num_kv_heads * group, head_dim, generator=random)
        keys = torch.randn(num_kv_heads, num_keys, head_dim, generator=random)
        values = torch.randn(num_kv_heads, num_keys, head_dim, generator=random)
        scale = head_dim**-0.5
        # Every key goes to a part of its own choice, so parts are scattered, unequal and sometimes empty.
        part_of = torch.randint(0, num_parts, (num_keys,), generator=random)
        members = [(part_of == part).nonzero().flatten() for part in range(num_parts)]
        merged = merge_all(
            partial_attention(q, keys[:, member], values[:, member], scale=scale) for member in members
        )
        errors.append(float((merged.out.double() - _full_attention(q, keys, values, scale)).abs().max()))
        empty_parts += sum(len(member) == 0 for member in members)
        parts_seen += num_parts
    return {
        "max_error": Quantity.largest(errors, ""),
        "parts": Quantity(parts_seen, "parts"),
        "empty_parts": Quantity(empty_parts, "parts"),
    }


CLAIM = Claim(
    name="exact-merge",
    title="Attention is a fold",
    headline="Attention over the parts of any partition of the past, merged, equals full attention.",
    scale=(
        "1,000 random partitions of up to 512 keys into 1 to 12 scattered parts, some of them empty; 1 to 8 queries, "
        "1 to 12 heads, head sizes 8 to 128, fp32, against softmax attention in float64."
    ),
    bars=(
        Bar(
            quantity="max_error",
            relation="<=",
            value=1e-5,
            unit="",
            why="Values are about 1, and fp32 sums of up to 512 of them round to a few 1e-7.",
        ),
        Bar(
            quantity="empty_parts",
            relation=">=",
            value=1,
            unit="parts",
            why="An empty part is the case in which the textbook formula gives NaN.",
        ),
    ),
    measure=_measure,
)
