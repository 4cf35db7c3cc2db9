"""Biases by distance: the numbers themselves, and attention with them against attention by the book."""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracle import assert_partials_close, brute_force
from torch import Tensor

from plait import ops
from plait.ops import (
    Causal,
    DistanceBias,
    Everything,
    Far,
    Mask,
    Placed,
    SomeQueries,
    Tree,
    native,
    reference,
)
from plait.ops.distance_bias import (
    _TABLE,
    Schedule,
    _harmonic_series,
    alibi_slopes,
    harmonic_numbers,
    harmonic_slopes,
)

HEADS = 6
PARENTS = [-1, 0, 0, 1, 2, 2, 5]


def bias_of(schedule: Schedule, limit: int | None = None) -> DistanceBias:
    return DistanceBias(torch.tensor(alibi_slopes(HEADS)), schedule, limit)


def inputs(num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(num_queries, HEADS, 8), torch.randn(2, num_keys, 8), torch.randn(2, num_keys, 8)


def test_harmonic_numbers_are_sums_of_reciprocals() -> None:
    wanted = [0, 1, 3, 200, 10_000, _TABLE - 1, _TABLE, 300_000]
    found = harmonic_numbers(torch.tensor(wanted))
    exact = [math.fsum(1 / t for t in range(1, n + 1)) for n in wanted]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_series_meets_the_table() -> None:
    near = torch.tensor([10_000, _TABLE - 1])
    torch.testing.assert_close(_harmonic_series(near), harmonic_numbers(near), atol=1e-9, rtol=0)
    assert harmonic_numbers(torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_slopes_are_those_of_the_published_code() -> None:
    # From get_slopes of github.com/ofirpress/attention_with_linear_biases.
    eight = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    assert alibi_slopes(8) == eight
    twelve = [*eight, 0.7071067811865476, 0.35355339059327384, 0.17677669529663692, 0.08838834764831849]
    assert alibi_slopes(12) == pytest.approx(twelve, rel=1e-15)
    assert alibi_slopes(1) == [2.0**-8]
    assert all(len(alibi_slopes(heads)) == heads for heads in range(1, 40))
    assert harmonic_slopes(3) == [1.0, 0.5, 1 / 3]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("schedule", ["harmonic", "linear"])
@pytest.mark.parametrize(
    "mask", [Causal(), Everything(), Tree(PARENTS)], ids=["causal", "everything", "tree"]
)
def test_attention_equals_the_formula_and_so_do_its_parts(
    mask: Mask, schedule: Schedule, limit: int | None, softcap: float | None
) -> None:
    q, keys, values = inputs(7, 20)
    bias, first = bias_of(schedule, limit), 13
    positions = [first + depth for depth in mask.depths(7).tolist()]
    of_keys = [*range(first), *(positions if isinstance(mask, Tree) else range(first, 20))]

    def cost(distance: int) -> float:
        n = min(abs(distance), limit or 99)
        return n if schedule == "linear" else sum(1 / t for t in range(1, n + 1))

    table = torch.tensor([[cost(at - key) for key in of_keys] for at in positions], dtype=torch.float64)
    added = -torch.tensor(alibi_slopes(HEADS), dtype=torch.float64)[:, None, None] * table
    visible = torch.ones(7, 20, dtype=torch.bool)
    view = mask.view(first, range(7), 0, 20)
    if view.visible is not None:
        visible = view.visible
    wanted = brute_force(q, keys, values, scale=0.4, visible=visible, softcap=softcap, added=added)

    def part(low: int, high: int) -> ops.Partial:
        return ops.partial_attention(
            q, keys[:, low:high], values[:, low:high], scale=0.4, softcap=softcap, bias=bias, mask=mask,
            first_query=first, first_key=low,
        )  # fmt: skip

    assert_partials_close(part(0, 20), wanted)
    assert_partials_close(ops.merge_all([part(0, 1), part(1, 15), part(15, 20)]), wanted)


def test_masks_say_where_queries_and_keys_stand() -> None:
    tree = Tree(PARENTS)
    depths = [0, 1, 1, 2, 2, 2, 3]
    assert tree.positions(10, range(1, 4)).tolist() == [11, 11, 12]
    assert tree.key_positions(10, 8, range(1, 6)).tolist() == [9, 10, 11, 11, 12]
    for mask in (Far(tree, 3, 7), SomeQueries(tree, range(7), 7), Placed(tree, torch.tensor(depths))):
        assert mask.distances(10, range(7), 8, range(9)).tolist() == [
            [10 + depth - key for key in (8, 9, *(10 + node for node in depths))] for depth in depths
        ]
    some = SomeQueries(tree, range(3, 6), 7)
    assert some.positions(10, range(1, 3)).tolist() == [12, 12]
    moved = Placed(Causal(), torch.tensor([5, -2]))
    assert moved.positions(10, range(2)).tolist() == [15, 8]
    assert moved.view(10, range(2), 9, 4).high == Causal().view(10, range(2), 9, 4).high


def test_slopes_of_zero_change_no_bit() -> None:
    q, keys, values = inputs(9, 30)
    plain = reference.partial_attention(q, keys, values, scale=0.3, mask=Causal(), first_query=21)
    flat = DistanceBias(torch.zeros(HEADS), "linear")
    given = ops.partial_attention(q, keys, values, scale=0.3, mask=Causal(), first_query=21, bias=flat)
    assert torch.equal(given.out, plain.out)
    assert torch.equal(given.lse, plain.lse)


def test_gradients_equal_those_of_torch() -> None:
    tensors = inputs(6, 10)
    ours = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.double().requires_grad_() for t in tensors]
    weight = torch.randn(6, HEADS, 8)
    given = ops.partial_attention(*ours, scale=0.6, mask=Causal(), first_query=4, bias=bias_of("harmonic"))
    (given.out * weight).sum().backward()
    distance = torch.arange(4, 10)[:, None] - torch.arange(10)
    k, v = (t.repeat_interleave(3, dim=0) for t in theirs[1:])
    scores = torch.einsum("qhd,htd->hqt", theirs[0], k) * 0.6
    growth = torch.tensor([math.fsum(1 / t for t in range(1, n + 1)) for n in range(10)]).double()
    slopes = torch.tensor(alibi_slopes(HEADS)).double()
    scores = scores - slopes[:, None, None] * growth[distance.clamp(min=0)]
    p = scores.masked_fill(distance < 0, -math.inf).softmax(dim=-1)
    (torch.einsum("hqt,htv->qhv", p, v) * weight).sum().backward()
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, true.grad.float(), atol=1e-5, rtol=1e-5)


def test_the_native_form_leaves_biased_scores_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_everywhere", lambda: True)
    q, keys, values = inputs(3, 12)
    assert native.takes((q, Causal(), None))
    assert not native.takes((q, Causal(), bias_of("linear")))
    assert not native.takes((q, Placed(Causal(), torch.arange(3))))
    options = {"scale": 0.3, "mask": Causal(), "first_query": 9, "bias": bias_of("linear")}
    given = ops.partial_attention(q, keys, values, **options)  # type: ignore[arg-type]
    wanted = reference.partial_attention(q, keys, values, **options)  # type: ignore[arg-type]
    assert torch.equal(given.out, wanted.out)


def test_a_temperature_divides_the_bias() -> None:
    bias = bias_of("harmonic")
    torch.testing.assert_close(bias.divided_by(0.5).at(9), 2 * bias.at(9))
    assert bias.at(9).shape == (HEADS,)
