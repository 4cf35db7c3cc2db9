"""Attention over one part of the past equals attention by the book."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import FP32_TOLERANCE, assert_partials_close, brute_force
from torch import Tensor

from plait.ops import Causal, Everything, Mask, Partial, Tree, View, empty_partial, reference
from plait.ops import partial_attention as dispatched_attention

FORMS = {"dispatched": dispatched_attention, "reference": reference.partial_attention}
partial_attention: Callable[..., Partial] = dispatched_attention


@pytest.fixture(autouse=True, params=list(FORMS))
def _each_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with the form that is dispatched to and with the reference."""
    monkeypatch.setattr(sys.modules[__name__], "partial_attention", FORMS[request.param])


SHAPES = [
    # queries, keys, query heads, key/value heads, head size, value size
    (1, 1, 1, 1, 1, 1),
    (1, 33, 6, 2, 10, 7),
    (7, 1, 4, 4, 8, 8),
    (5, 13, 9, 3, 5, 11),
    (17, 17, 8, 1, 6, 3),
    # equal head and value sizes, which the fused kernel takes
    (1, 33, 6, 2, 8, 8),
    (5, 13, 9, 3, 16, 16),
    (17, 17, 8, 1, 8, 8),
    (40, 300, 6, 2, 64, 64),
]


def inputs(
    num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(num_queries, num_heads, head_dim)
    return q, torch.randn(num_kv_heads, num_keys, head_dim), torch.randn(num_kv_heads, num_keys, value_dim)


def seen(
    mask: Mask, num_queries: int, first_query: int, num_keys: int, first_key: int, window: int | None
) -> Tensor:
    """The whole visibility table (Q, T), from the view of all queries at once."""
    view = mask.view(first_query, range(num_queries), first_key, num_keys, window)
    table = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    table[:, view.low : view.high] = True if view.visible is None else view.visible
    return table


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_unmasked_attention_equals_brute_force(shape: tuple[int, ...], softcap: float | None) -> None:
    q, keys, values = inputs(*shape)
    given = partial_attention(q, keys, values, scale=0.7, softcap=softcap)
    assert given.out.dtype == given.lse.dtype == torch.float32
    assert_partials_close(given, brute_force(q, keys, values, scale=0.7, softcap=softcap))


TREE = Tree([-1, 0, 0, 1, 1, 4, 2])


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(
    ("mask", "first_key", "num_keys"),
    [
        *((mask, first_key, 11) for mask in (Causal(), Everything()) for first_key in (0, 9, 18, 40)),
        # The nodes of a tree are the last keys of their strand; other strands hold the past alone.
        *((TREE, first_key, num_keys) for first_key, num_keys in ((0, 11), (9, 11 + 7), (20, 7))),
    ],
)
def test_masked_attention_equals_brute_force(
    mask: Mask, first_key: int, num_keys: int, window: int | None
) -> None:
    num_queries, first_query = 7, 20
    q, keys, values = inputs(num_queries, num_keys, 6, 3, 5, 4)
    given = partial_attention(
        q, keys, values, scale=0.4, mask=mask, first_query=first_query, first_key=first_key, window=window
    )
    visible = seen(mask, num_queries, first_query, num_keys, first_key, window)
    assert_partials_close(given, brute_force(q, keys, values, scale=0.4, visible=visible))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_equals_torch(num_kv_heads: int, is_causal: bool) -> None:
    q, keys, values = inputs(24, 24, 8, num_kv_heads, 16, 16)
    given = partial_attention(q, keys, values, scale=16**-0.5, mask=Causal() if is_causal else None)
    wanted = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None], is_causal=is_causal, enable_gqa=True
    )
    torch.testing.assert_close(given.out, wanted[0].transpose(0, 1), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


@pytest.mark.parametrize("mask", [Causal(), Everything(), Tree([-1, *range(36)])])
@pytest.mark.parametrize("window", [None, 9])
def test_blocks_of_queries_give_the_same_result(
    mask: Mask, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, keys, values = inputs(37, 50, 4, 2, 8, 6)

    def attend() -> tuple[Tensor, Tensor]:
        return partial_attention(
            q, keys, values, scale=0.3, mask=mask, first_query=13, window=window, softcap=5.0
        )

    whole = attend()
    seen_blocks = []
    plain = type(mask).view

    def view(self: Mask, first_query: int, block: range, *rest: Any) -> View:
        seen_blocks.append(block)
        return plain(self, first_query, block, *rest)

    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 4 * 50 * 5)
    monkeypatch.setattr(type(mask), "view", view)
    blocks = attend()
    assert [len(block) for block in seen_blocks] == [5] * 7 + [2]
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_a_block_budget_below_one_query_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys, values = inputs(3, 5, 2, 1, 4, 4)
    whole = partial_attention(q, keys, values, scale=1.0, mask=Causal(), first_query=2)
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 1)
    rows = partial_attention(q, keys, values, scale=1.0, mask=Causal(), first_query=2)
    torch.testing.assert_close(whole.out, rows.out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 4), (4, 0), (0, 0)])
def test_no_token_gives_the_empty_part(num_queries: int, num_keys: int) -> None:
    given = partial_attention(*inputs(num_queries, num_keys, 4, 2, 8, 5), scale=1.0, mask=Causal())
    wanted = empty_partial(num_queries, 4, 5)
    assert torch.equal(given.out, wanted.out)
    assert torch.equal(given.lse, wanted.lse)


def test_queries_that_see_nothing_get_the_empty_part_and_the_others_do_not() -> None:
    q, keys, values = inputs(6, 4, 2, 2, 8, 8)
    given = partial_attention(q, keys, values, scale=1.0, mask=Causal(), first_query=0, first_key=3)
    assert (given.out[:3] == 0).all()
    assert (given.lse[:3] == -math.inf).all()
    assert given.lse[3:].isfinite().all()
    behind = partial_attention(q, keys, values, scale=1.0, mask=Causal(), first_query=90, window=3)
    assert torch.equal(behind.lse, torch.full((6, 2), -math.inf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_of_half_precision_are_read_exactly_and_summed_in_fp32(dtype: torch.dtype) -> None:
    q, keys, values = inputs(5, 40, 4, 2, 8, 8)
    keys, values = keys.to(dtype), values.to(dtype)
    given = partial_attention(q, keys, values, scale=0.5)
    assert given.out.dtype == torch.float32
    assert_partials_close(given, brute_force(q, keys, values, scale=0.5))


def test_non_contiguous_input_gives_the_same_bits() -> None:
    q, keys, values = inputs(9, 21, 6, 3, 8, 8)
    strided = (
        q.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([keys, keys], dim=1)[:, :21],
        torch.stack([values, values], dim=-1)[..., 0],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    plain = partial_attention(q, keys, values, scale=0.5, mask=Causal(), first_query=12)
    given = partial_attention(*strided, scale=0.5, mask=Causal(), first_query=12)
    torch.testing.assert_close(given.out, plain.out, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(given.lse, plain.lse, atol=1e-6, rtol=1e-6)


def test_scores_too_large_for_exp_do_not_overflow() -> None:
    q, keys, values = inputs(3, 6, 2, 2, 8, 8)
    given = partial_attention(q * 100, keys * 100, values, scale=1.0)
    assert_partials_close(given, brute_force(q * 100, keys * 100, values, scale=1.0), tolerance=1e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_equal_those_of_torch(softcap: float | None) -> None:
    tensors = inputs(6, 10, 4, 2, 8, 5)
    ours = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.double().requires_grad_() for t in tensors]
    weight = torch.randn(6, 4, 5)
    given = partial_attention(*ours, scale=0.6, mask=Causal(), first_query=4, softcap=softcap)
    (given.out * weight).sum().backward()

    scores = torch.einsum("qhd,htd->hqt", theirs[0], theirs[1].repeat_interleave(2, dim=0)) * 0.6
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.arange(10) > torch.arange(4, 10)[:, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    out = torch.einsum("hqt,htv->qhv", weights, theirs[2].repeat_interleave(2, dim=0))
    (out * weight).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_gradients_are_finite_where_a_query_sees_nothing() -> None:
    tensors = [t.requires_grad_() for t in inputs(4, 5, 2, 1, 4, 4)]
    given = partial_attention(*tensors, scale=1.0, mask=Causal(), first_query=0, first_key=2)
    given.out.sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert tensors[0].grad is not None
    assert (tensors[0].grad[:2] == 0).all()


@pytest.mark.parametrize("first_key", [0, 1, 5, 11, 12])
@pytest.mark.parametrize("num_keys", [1, 3, 11, 12, 20])
def test_a_strand_may_begin_among_the_queries(first_key: int, num_keys: int) -> None:
    q, keys, values = inputs(12, num_keys, 4, 2, 8, 8)
    given = partial_attention(q, keys, values, scale=0.5, mask=Causal(), first_key=first_key)
    table = torch.arange(12)[:, None] >= first_key + torch.arange(num_keys)[None, :]
    expected = brute_force(q, keys, values, scale=0.5, visible=table)
    assert_partials_close(given, expected)
