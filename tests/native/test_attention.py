"""Native partial attention: equal to the reference, and one result for a query however it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_support import extension, isas, running, switched_off
from torch import Tensor

from plait.ops import Causal, Everything, Mask, Tree, native, reference

pytestmark = switched_off

# fp32 sums of up to 700 terms in another order; scores of a few units.
TOLERANCE = 5e-6

SHAPES = [  # queries, heads, kv heads, head size, value size, keys
    (1, 9, 3, 64, 64, 700),
    (5, 9, 3, 64, 64, 257),
    (40, 4, 4, 80, 33, 513),
    (9, 2, 1, 7, 5, 12),
    (66, 8, 1, 32, 96, 300),
    (2, 3, 3, 1, 1, 2),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    queries, heads, kv_heads, dim, value_dim, keys = shape
    return (
        torch.randn(queries, heads, dim),
        torch.randn(kv_heads, keys, dim).to(dtype),
        torch.randn(kv_heads, keys, value_dim).to(dtype),
    )


def random_tree(count: int) -> Tree:
    return Tree([-1] + [int(torch.randint(0, node, ())) for node in range(1, count)])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    q, keys, values = inputs(shape, dtype)
    queries, length = shape[0], shape[-1]
    for mask in (None, Everything(), Causal(), random_tree(queries)):
        for window in (None, 1, 100):
            for softcap in (None, 5.0):
                options: dict[str, Any] = {
                    "scale": 0.4, "mask": mask, "first_query": 7 + length - queries, "first_key": 7,
                    "window": window, "softcap": softcap,
                }  # fmt: skip
                wanted = reference.partial_attention(q, keys, values, **options)
                with running(isa=isa):
                    found = native.partial_attention(q, keys, values, **options)
                torch.testing.assert_close(found.out, wanted.out, atol=TOLERANCE, rtol=TOLERANCE)
                torch.testing.assert_close(found.lse, wanted.lse, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("first_query", [-5, 0, 3, 400])
def test_queries_before_within_and_after_the_strand(first_query: int) -> None:
    q, keys, values = inputs((6, 4, 2, 16, 16, 290), torch.float32)
    for mask, window in [(Causal(), None), (Causal(), 20), (Everything(), 20), (random_tree(6), 300)]:
        if isinstance(mask, Tree) and first_query != 400:
            continue
        options: dict[str, Any] = {
            "scale": 0.3,
            "mask": mask,
            "first_query": first_query,
            "first_key": 2,
            "window": window,
        }
        wanted = reference.partial_attention(q, keys, values, **options)
        found = native.partial_attention(q, keys, values, **options)
        torch.testing.assert_close(found.out, wanted.out, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(found.lse, wanted.lse, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_see_is_the_identity_of_merge(queries: int, keys: int) -> None:
    q, k, v = inputs((queries, 4, 2, 16, 24, keys), torch.float32)
    part = native.partial_attention(q, k, v, scale=1.0, mask=Causal())
    assert part.out.shape == (queries, 4, 24)
    assert bool((part.out == 0).all())
    assert bool((part.lse == -torch.inf).all())


def test_views_of_storage_are_read_in_place() -> None:
    storage = torch.full((2, 2, 400, 48), float("nan"))
    storage[:, :, 30:300, :40] = torch.randn(2, 2, 270, 40)
    keys, values = storage[0, :, 30:300, :40], storage[1, :, 30:300, :40]
    q = torch.randn(3, 50, 40)[:, 5:11]
    found = native.partial_attention(q, keys, values, scale=0.2)
    wanted = reference.partial_attention(q, keys, values, scale=0.2)
    torch.testing.assert_close(found.out, wanted.out, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_query_has_the_same_bits_in_any_chunk_batch_width_and_number_of_threads() -> None:
    """200 random mixes: how many queries are asked at once, keys stored beyond them, threads, instruction set."""
    generator = torch.Generator().manual_seed(3)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    sets = extension().isas()
    for trial in range(200):
        group, kv_heads, dim = pick(1, 5), pick(1, 4), pick(1, 5) * 16
        length, dtype = pick(1, 900), [torch.float32, torch.bfloat16, torch.float16][trial % 3]
        window = None if trial % 4 else pick(1, 400)
        queries = pick(1, min(length, 70) + 1)
        q, keys, values = inputs((queries, group * kv_heads, kv_heads, dim, dim, length), dtype)
        first = length - queries
        options: dict[str, Any] = {"scale": dim**-0.5, "mask": Causal(), "window": window}
        whole = native.partial_attention(q, keys, values, first_query=first, **options)
        row = pick(0, queries)
        stop = pick(row + 1, queries + 1)
        with running(isa=sets[trial % min(3, len(sets))], threads=1 + trial % 4):
            # The keys that a shorter chunk has not written yet are absent.
            part = native.partial_attention(
                q[row:stop],
                keys[:, : first + stop],
                values[:, : first + stop],
                first_query=first + row,
                **options,
            )
        assert torch.equal(part.out, whole.out[row:stop])
        assert torch.equal(part.lse, whole.lse[row:stop])


def test_a_draft_branch_has_the_bits_of_plain_decoding() -> None:
    past, depth = 300, 6
    q, keys, values = inputs((depth, 6, 2, 32, 32, past + depth), torch.float32)
    chain = native.partial_attention(q, keys, values, scale=0.2, mask=Causal(), first_query=past)
    tree = native.partial_attention(
        q, keys, values, scale=0.2, mask=Tree([-1, *range(depth - 1)]), first_query=past
    )
    assert torch.equal(tree.out, chain.out)


def test_trees_of_more_than_64_nodes() -> None:
    mask = random_tree(130)
    q, keys, values = inputs((130, 2, 1, 16, 16, 200), torch.float32)
    for window in (None, 4):
        options: dict[str, Any] = {"scale": 0.3, "mask": mask, "first_query": 70, "window": window}
        wanted = reference.partial_attention(q, keys, values, **options)
        found = native.partial_attention(q, keys, values, **options)
        torch.testing.assert_close(found.out, wanted.out, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(found.lse, wanted.lse, atol=TOLERANCE, rtol=TOLERANCE)


def test_nan_of_one_query_stays_in_its_row() -> None:
    q, keys, values = inputs((4, 2, 1, 16, 16, 20), torch.float32)
    clean = native.partial_attention(q, keys, values, scale=0.3)
    q[1, 0, 3] = float("nan")
    found = native.partial_attention(q, keys, values, scale=0.3)
    assert bool(found.out[1, 0].isnan().all())
    found.out[1, 0] = clean.out[1, 0]
    assert torch.equal(found.out, clean.out)


def test_unknown_masks_go_to_the_reference() -> None:
    class Own(Mask):
        pass

    assert not native.takes([torch.zeros(1), Own()])
    assert native.takes([torch.zeros(1), Causal()])


def test_what_does_not_fit_is_refused() -> None:
    module, empty = extension(), torch.zeros(2, 4)
    q, keys, values = inputs((2, 4, 2, 16, 16, 5), torch.float32)

    def call(**changes: Any) -> None:
        arguments: dict[str, Any] = {
            "q": q, "keys": keys, "values": values, "scale": 1.0, "mask_kind": 0, "first_query": 0, "first_key": 0,
            "window": 0, "softcap": 0.0, "depths": None, "ancestors": None, "out": torch.zeros(2, 4, 16), "lse": empty,
        }  # fmt: skip
        module.partial_attention(**(arguments | changes))

    call()
    for changes in (
        {"keys": keys[:, :, :15]}, {"values": values[:, :4]}, {"values": values.half()}, {"out": torch.zeros(2, 4, 15)},
        {"q": q[:, :3]}, {"keys": keys.double()}, {"mask_kind": 3}, {"mask_kind": 2}, {"window": -1},
        {"lse": torch.zeros(4, 2).T}, {"keys": keys.transpose(1, 2).contiguous().transpose(1, 2)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"must|needs"):
            call(**changes)


@pytest.mark.parametrize("isa", isas())
def test_values_that_overflow_are_not_seen_by_earlier_queries(isa: str) -> None:
    q, keys, values = inputs((6, 4, 2, 16, 16, 20), torch.float32)
    with running(isa=isa):
        clean = native.partial_attention(q, keys, values, scale=0.3, mask=Causal(), first_query=14)
        values[:, 18] = torch.inf
        keys[:, 19] = torch.nan
        found = native.partial_attention(q, keys, values, scale=0.3, mask=Causal(), first_query=14)
    assert torch.equal(found.out[:4], clean.out[:4])
    assert bool(found.out[4].isinf().all())
    assert bool(found.out[5].isnan().all())


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("window", [None, 2, 5])
def test_a_tree_whose_nodes_lie_in_two_strands(window: int | None, isa: str) -> None:
    """As under a policy that keeps the first tokens apart while the draft is among them."""
    mask = Tree([-1, 0, 0, 1, 3, 2, 4])
    q, keys, values = inputs((7, 4, 2, 16, 16, 9), torch.float32)
    for first_key, part in ((3, slice(0, 4)), (7, slice(4, 9))):
        options: dict[str, Any] = {
            "scale": 0.3,
            "mask": mask,
            "first_query": 5,
            "first_key": first_key,
            "window": window,
        }
        wanted = reference.partial_attention(q, keys[:, part], values[:, part], **options)
        with running(isa=isa):
            found = native.partial_attention(q, keys[:, part], values[:, part], **options)
        torch.testing.assert_close(found.out, wanted.out, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(found.lse, wanted.lse, atol=TOLERANCE, rtol=TOLERANCE)
