"""The merge of any partition of the past equals attention over all of it."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from attention_oracle import FP32_TOLERANCE, assert_partials_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import ConfigError
from plait.ops import Causal, Partial, empty_partial, merge, merge_all, partial_attention

# Two ways to round a sum of three fp32 terms.
ASSOCIATIVITY_TOLERANCE = 1e-6
EXAMPLES = settings(deadline=None, max_examples=60, derandomize=True)


def parts_at(
    cuts: list[int], seed: int, first_query: int, window: int | None
) -> tuple[Partial, list[Partial]]:
    """Attention of four queries over 24 keys, whole and cut into runs of keys."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(4, 4, 6, generator=generator)
    keys, values = torch.randn(2, 24, 6, generator=generator), torch.randn(2, 24, 5, generator=generator)

    def over(low: int, high: int) -> Partial:
        return partial_attention(
            q,
            keys[:, low:high],
            values[:, low:high],
            scale=0.8,
            mask=Causal(),
            first_query=first_query,
            first_key=low,
            window=window,
        )

    bounds = [0, *sorted(cuts), 24]
    return over(0, 24), [over(low, high) for low, high in pairwise(bounds)]


def random_partial(seed: int, empty_rows: bool = True) -> Partial:
    generator = torch.Generator().manual_seed(seed)
    out, lse = torch.randn(6, 3, 4, generator=generator), 5 * torch.randn(6, 3, generator=generator)
    if empty_rows:
        nothing = torch.rand(6, 3, generator=generator) < 0.3
        out, lse = out.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, -math.inf)
    return Partial(out, lse)


@EXAMPLES
@given(
    cuts=st.lists(st.integers(0, 24), max_size=6),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 1000),
    first_query=st.sampled_from([0, 3, 20, 24]),
    window=st.sampled_from([None, 1, 7]),
)
def test_merge_of_any_partition_in_any_order_equals_full_attention(
    cuts: list[int], order: random.Random, seed: int, first_query: int, window: int | None
) -> None:
    whole, parts = parts_at(cuts, seed, first_query, window)
    order.shuffle(parts)
    assert_partials_close(merge_all(parts), whole)


@EXAMPLES
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_merge_is_commutative_bit_for_bit(a: int, b: int) -> None:
    one, other = random_partial(a), random_partial(b)
    left, right = merge(one, other), merge(other, one)
    assert torch.equal(left.out, right.out)
    assert torch.equal(left.lse, right.lse)


@EXAMPLES
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_merge_is_associative(a: int, b: int, c: int) -> None:
    one, two, three = random_partial(a), random_partial(b), random_partial(c)
    assert_partials_close(
        merge(merge(one, two), three), merge(one, merge(two, three)), ASSOCIATIVITY_TOLERANCE
    )


@EXAMPLES
@given(st.integers(0, 10**6))
def test_the_empty_part_changes_no_bit(seed: int) -> None:
    part = random_partial(seed)
    for merged in (merge(part, empty_partial(6, 3, 4)), merge(empty_partial(6, 3, 4), part)):
        assert torch.equal(merged.out, part.out)
        assert torch.equal(merged.lse, part.lse)


def test_two_empty_parts_give_the_empty_part() -> None:
    merged = merge(empty_partial(2, 3, 4), empty_partial(2, 3, 4))
    assert torch.equal(merged.out, torch.zeros(2, 3, 4))
    assert torch.equal(merged.lse, torch.full((2, 3), -math.inf))


@pytest.mark.parametrize("lse", [-1e30, -200.0, 200.0, 1e30])
def test_merge_does_not_overflow(lse: float) -> None:
    part = Partial(torch.ones(1, 1, 2), torch.full((1, 1), lse))
    other = Partial(torch.zeros(1, 1, 2), torch.zeros(1, 1))
    merged = merge(part, other)
    assert torch.equal(merged.out, torch.full((1, 1, 2), 1.0 if lse > 0 else 0.0))
    assert merged.lse.item() == max(torch.tensor(lse).item(), 0.0)


def test_equal_parts_share_the_weight() -> None:
    a = Partial(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    b = Partial(torch.ones(1, 1, 1), torch.zeros(1, 1))
    merged = merge(a, b)
    assert merged.out.item() == 0.5
    assert merged.lse.item() == pytest.approx(math.log(2))


def test_merge_of_no_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one part"):
        merge_all([])


def test_gradients_of_merge_are_exact() -> None:
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    def merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(merge(Partial(out_a, lse_a), Partial(out_b, lse_b)))

    assert torch.autograd.gradcheck(merged, (tensor(3, 2, 4), tensor(3, 2), tensor(3, 2, 4), tensor(3, 2)))


def test_gradients_through_a_partition_equal_those_of_full_attention() -> None:
    tensors = [torch.randn(5, 4, 8), torch.randn(2, 12, 8), torch.randn(2, 12, 8)]
    weight = torch.randn(5, 4, 8)

    def gradients(cuts: list[int]) -> list[Tensor]:
        q, keys, values = (t.clone().requires_grad_() for t in tensors)
        bounds = [0, *cuts, 12]
        parts = [
            partial_attention(
                q,
                keys[:, low:high],
                values[:, low:high],
                scale=0.5,
                mask=Causal(),
                first_query=2,
                first_key=low,
                window=4,
            )
            for low, high in pairwise(bounds)
        ]
        (merge_all(parts).out * weight).sum().backward()
        return [t.grad for t in (q, keys, values) if t.grad is not None]

    whole = gradients([])
    # The last part is seen by none of the queries, and the first by some of them.
    for given_, wanted in zip(gradients([1, 5, 5, 9]), whole, strict=True):
        assert given_.isfinite().all()
        torch.testing.assert_close(given_, wanted, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_gradients_through_rows_that_see_nothing_are_finite() -> None:
    out = torch.zeros(2, 1, 3, requires_grad=True)
    lse = torch.full((2, 1), -math.inf, requires_grad=True)
    merged = merge(Partial(out, lse), empty_partial(2, 1, 3))
    (merged.out.sum() + merged.lse.exp().sum()).backward()
    for tensor in (out, lse):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
