"""Short strands of single sequences are visited side by side, and each sequence answers as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import LAYERS, TokenTable, assert_equal_to, ids_of, new_memory, random_tree
from torch.utils._python_dispatch import TorchDispatchMode

from plait import ops
from plait.memory import Memory, MemoryPlan, Partial, Rows, Segment, Visit, attend, side_by_side
from plait.ops import padded, padded_attention
from plait.ops.native import is_everywhere

TABLE = TokenTable(LAYERS["grouped"])
PRODUCTS = ("bmm", "mm", "_scaled_dot_product_flash_attention_for_cpu")


class Products(TorchDispatchMode):
    """Counts the products of matrices, by which attention is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


def forks(
    lengths: Sequence[int], layer: str = "grouped", spec: str = "full"
) -> list[tuple[Memory, list[int]]]:
    """Memories that share 100 tokens, and have each so many of their own."""
    table = TokenTable(LAYERS[layer])
    root = new_memory(LAYERS[layer], spec)
    table.write(root, ids_of(100))
    found = []
    for number, length in enumerate(lengths):
        memory, own = root.fork(), ids_of(length, seed=number + 1)
        if own:
            table.write(memory, own)
        found.append((memory, [*ids_of(100), *own]))
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.sampled_from([0, 1, 2, 31, 32, 33, 63, 64, 65, 200, 255, 256, 300]), min_size=2, max_size=7
    ),
    counts=st.lists(st.integers(1, 4), min_size=7, max_size=7),
    layer=st.sampled_from(sorted(LAYERS)),
)
def test_tails_of_any_lengths_and_any_numbers_of_queries_equal_lone_ones(
    lengths: list[int], counts: list[int], layer: str
) -> None:
    table = TokenTable(LAYERS[layer])
    some = forks(lengths, layer)
    news = [ids_of(count, seed=50 + number) for number, count in enumerate(counts[: len(some)])]
    rows = Rows([(len(new), len(ids)) for new, (_, ids) in zip(news, some, strict=True)])
    out = attend([memory for memory, _ in some], *table.rows([i for new in news for i in new]), rows)
    for segment, new, (_, ids) in zip(rows.segments, news, some, strict=True):
        assert_equal_to(out[segment.rows], table.answer(ids, new))


def test_a_mixed_batch_of_runs_trees_windows_and_strangers_equals_lone_sequences() -> None:
    tree = random_tree(5, torch.Generator().manual_seed(3))

    def made() -> list[Memory]:
        shared, windows = forks([3, 40, 0]), forks([20, 25, 60], spec="window:size=90")
        return [*(memory for memory, _ in [*shared, *windows]), *(new_memory() for _ in range(3))]

    batch, lone = made(), made()
    news = [ids_of(5 if number % 3 else 1, seed=number) for number in range(len(batch))]
    masks = [(tree,) if len(new) == 5 and number % 2 else () for number, new in enumerate(news)]
    rows = Rows(
        [(len(new), len(memory), *mask) for new, memory, mask in zip(news, batch, masks, strict=True)]
    )
    out = attend(batch, *TABLE.rows([i for new in news for i in new]), rows)
    for segment, new, memory, mask in zip(rows.segments, news, lone, masks, strict=True):
        wanted = memory.attend(*TABLE.rows(new), mask=mask[0] if mask else None)
        assert_equal_to(out[segment.rows], wanted.double())


def test_strangers_do_not_change_the_bits_of_a_family() -> None:
    def outputs(strangers: list[int]) -> torch.Tensor:
        some = [*forks([3, 40, 70]), *(forks(strangers) if strangers else [])]
        rows = Rows([(1, len(ids)) for _, ids in some])
        return attend([memory for memory, _ in some], *TABLE.rows([1] * len(some)), rows)[:3]

    assert torch.equal(outputs([]), outputs([9, 10, 200]))
    assert torch.equal(outputs([]), outputs([60] * 5))


@pytest.mark.parametrize("spec", ["dense:dtype=fp16", "dense:dtype=bf16"])
def test_tails_of_few_bits_equal_lone_ones(spec: str) -> None:
    batch, lone = (forks([3, 40, 70], spec=spec) for _ in range(2))
    new = [1, 2, 3]
    out = attend([memory for memory, _ in batch], *TABLE.rows(new), Rows([(1, len(ids)) for _, ids in batch]))
    for row, (memory, _) in enumerate(lone):
        assert_equal_to(out[row : row + 1], memory.attend(*TABLE.rows([new[row]])).double())


@pytest.mark.parametrize("lengths", [[40], [3, 9, 17, 30], [5, 40, 90, 200]])
def test_the_number_of_products_does_not_grow_with_the_number_of_sequences(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "is_everywhere", lambda: False)
    counts = []
    for times in (3, 9):
        some = forks(lengths * times)
        rows = Rows([(1, len(ids)) for _, ids in some])
        with torch.inference_mode(), Products() as products:
            attend([memory for memory, _ in some], *TABLE.rows([1] * len(some)), rows)
        counts.append(products.count)
    assert counts[0] == counts[1] > 0


def test_what_is_copied_at_a_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_NUMBERS_AT_ONCE", 2 * 32 * 2 * 16 * 2)
    sizes: list[int] = []

    def counted(q: torch.Tensor, *args: Any, **options: Any) -> Partial:
        sizes.append(len(q))
        return padded_attention(q, *args, **options)

    monkeypatch.setattr(side_by_side, "padded_attention", counted)
    some = forks([5] * 9)
    rows = Rows([(1, len(ids)) for _, ids in some])
    out = attend([memory for memory, _ in some], *TABLE.rows([4] * 9), rows)
    assert sizes == ([] if is_everywhere() else [4, 4])
    for row, (_, ids) in enumerate(some):
        assert_equal_to(out[row : row + 1], TABLE.answer(ids, [4]))


def test_watchers_are_told_the_part_of_every_visit() -> None:
    some = forks([5, 40, 70])
    told: list[tuple[Segment, list[int], Partial]] = []

    def watch(
        memory: Memory,
        segment: Segment,
        visits: Sequence[Visit],
        parts: Sequence[Partial | None],
        merged: Partial,
    ) -> None:
        assert all(part is not None and len(part.out) == segment.length for part in parts)
        whole = ops.merge_all([part for part in parts if part is not None])
        torch.testing.assert_close(whole.out, merged.out)
        told.append((segment, [len(visit.strand) for visit in visits], merged))

    some[1][0].watcher = watch
    out = attend(
        [memory for memory, _ in some], *TABLE.rows([1, 2, 3]), Rows([(1, len(ids)) for _, ids in some])
    )
    assert [lengths for _, lengths, _ in told] == [[100, 41]]
    torch.testing.assert_close(told[0][2].out, out[1:2])


def test_gradients_of_a_batch_are_those_of_lone_sequences() -> None:
    found = []
    for is_batch in (True, False):
        root = Memory(TABLE.heads, MemoryPlan(differentiable=True))
        TABLE.write(root, ids_of(40))
        memories = [root.fork() for _ in range(3)]
        q, k, v = (x.clone().requires_grad_() for x in TABLE.rows([1, 2, 3, 4, 5, 6]))
        inputs = [q, k, v]
        if is_batch:
            out = attend(memories, q, k, v, Rows([(2, 40)] * 3))
        else:
            pairs = [slice(2 * i, 2 * i + 2) for i in range(3)]
            out = torch.cat(
                [one.attend(q[at], k[at], v[at]) for one, at in zip(memories, pairs, strict=True)]
            )
        found.append(torch.autograd.grad(out.square().sum(), inputs))
    for ours, theirs in zip(*found, strict=True):
        assert float(ours.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_padded_attention_equals_the_reference_whatever_lies_hidden() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, queries = [3, 1, 7], 2
    q = torch.randn(len(lengths) * queries, 6, 4, generator=generator)
    keys = [torch.randn(2, length, 4, generator=generator) for length in lengths]
    values = [torch.randn(2, length, 5, generator=generator) for length in lengths]
    visible = (torch.arange(7) < torch.tensor(lengths)[:, None])[:, None].repeat(1, queries, 1)
    visible[1, 0] = False
    part = padded_attention(q, padded(keys, 7), padded(values, 7), visible, scale=0.5, softcap=2.0)
    for number, (own_keys, own_values) in enumerate(zip(keys, values, strict=True)):
        rows = slice(queries * number, queries * (number + 1))
        wanted = ops.reference.partial_attention(q[rows], own_keys, own_values, scale=0.5, softcap=2.0)
        kept = slice(1 if number == 1 else 0, queries)
        torch.testing.assert_close(part.out[rows][kept], wanted.out[kept], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part.lse[rows][kept], wanted.lse[kept], atol=1e-5, rtol=1e-5)
    assert bool((part.out[2] == 0).all())
    assert bool((part.lse[2] == -math.inf).all())
