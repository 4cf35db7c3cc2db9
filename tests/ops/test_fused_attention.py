"""Torch's fused kernel is used where it applies, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_oracle import assert_partials_close, brute_force
from torch import Tensor

from plait.ops import Causal, Everything, Mask, Tree, partial_attention, reference
from plait.ops.fused import fused_attention

KERNEL_CASES: dict[str, dict[str, Any]] = {
    "everything": {},
    "a past": {"mask": Causal(), "first_query": 40},
    "last rows": {"mask": Causal(), "first_query": 12},
    "last rows of a moved strand": {"mask": Causal(), "first_query": 112, "first_key": 100},
    "no other rows": {"mask": Causal(), "first_query": 7, "first_key": 7, "num_keys": 9},
    "inside a window": {"mask": Causal(), "first_query": 30, "window": 60},
    "as wide as the window": {"mask": Causal(), "first_query": 12, "window": 21},
    "the near end of a window": {"mask": Causal(), "first_query": 30, "num_queries": 1, "window": 12},
    "one row": {"mask": Causal(), "first_query": 20, "num_queries": 1},
    "a tree above its past": {"mask": Tree([-1, 0, 0, *range(2, 8)]), "first_query": 30},
}
OTHER_CASES: dict[str, dict[str, Any]] = {
    "some rows see nothing": {"mask": Causal(), "first_query": 0, "first_key": 4},
    "a strand that begins among the rows": {
        "mask": Causal(),
        "first_query": 4,
        "first_key": 8,
        "num_keys": 5,
    },
    "rows before the last": {"mask": Causal(), "first_query": 5},
    "a window that cuts": {"mask": Causal(), "first_query": 12, "window": 20},
    "nodes of a tree": {"mask": Tree([-1, 0, 0, *range(2, 8)]), "first_query": 12},
    "nothing to see": {"mask": Causal(), "first_query": 500, "window": 3},
    "a soft cap": {"softcap": 2.0},
}


def inputs(
    num_queries: int, num_keys: int, heads: tuple[int, int], value_dim: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(num_queries, heads[0], 8)
    return q, torch.randn(heads[1], num_keys, 8), torch.randn(heads[1], num_keys, value_dim)


def visible(
    num_queries: int, num_keys: int, mask: Mask, first_query: int, first_key: int, window: int | None
) -> Tensor:
    """Which keys each query sees, one pair at a time."""

    def sees(row: int, column: int) -> bool:
        view = mask.view(first_query, range(row, row + 1), first_key, num_keys, window)
        inside = view.low <= column < view.high
        return inside and (view.visible is None or bool(view.visible[0, column - view.low]))

    return torch.tensor([[sees(row, column) for column in range(num_keys)] for row in range(num_queries)])


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES)
def test_where_the_kernel_applies_it_equals_brute_force(case: dict[str, Any], heads: tuple[int, int]) -> None:
    options = dict(case)
    num_queries, num_keys = options.pop("num_queries", 9), options.pop("num_keys", 21)
    q, keys, values = inputs(num_queries, num_keys, heads)
    given = fused_attention(q, keys, values, scale=0.4, **options)
    assert given is not None
    defaults = {"mask": Everything(), "first_query": 0, "first_key": 0, "window": None}
    table = visible(num_queries, num_keys, **(defaults | options))
    assert_partials_close(given, brute_force(q, keys, values, scale=0.4, visible=table))


@pytest.mark.parametrize("case", OTHER_CASES.values(), ids=OTHER_CASES)
def test_elsewhere_the_reference_answers(case: dict[str, Any]) -> None:
    options = dict(case)
    q, keys, values = inputs(9, options.pop("num_keys", 21), (4, 2))
    assert fused_attention(q, keys, values, scale=0.4, **options) is None
    given = partial_attention(q, keys, values, scale=0.4, **options)
    wanted = reference.partial_attention(q, keys, values, scale=0.4, **options)
    assert torch.equal(given.out, wanted.out)
    assert torch.equal(given.lse, wanted.lse)


@pytest.mark.parametrize("kind", ["gradients", "half precision", "another value size"])
def test_tensors_of_other_kinds_go_to_the_reference(kind: str) -> None:
    q, keys, values = inputs(9, 21, (4, 2), value_dim=5 if kind == "another value size" else 8)
    if kind == "gradients":
        q.requires_grad_()
    if kind == "half precision":
        keys, values = keys.bfloat16(), values.bfloat16()
    assert fused_attention(q, keys, values, scale=0.4) is None
    assert partial_attention(q, keys, values, scale=0.4).out.requires_grad == (kind == "gradients")


def test_without_gradients_a_trained_tensor_may_take_the_kernel() -> None:
    q, keys, values = inputs(3, 5, (2, 2))
    q.requires_grad_()
    with torch.no_grad():
        assert fused_attention(q, keys, values, scale=0.4) is not None
