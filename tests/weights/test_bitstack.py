"""BitStack's blocks against their formulas, and the stack of a matrix as it grows and shrinks."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coded import stats_of, weights

from plait.errors import ConfigError
from plait.spec import bytes_of
from plait.weights import FORMATS, BitStack, BlockStack, Stats
from plait.weights.bitstack import magnitudes, signed_blocks
from plait.weights.stacked_blocks import SignedBlock, block_bytes, join_block, split_block

# fp32 sums of some hundred terms in another order.
TOLERANCE = 1e-5


def first(packed: BlockStack, count: int) -> BlockStack:
    return BlockStack(packed.shape, packed.rank, packed.blocks[:count], packed.depth)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 16), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_blocks_come_back_from_their_bytes(rows: int, columns: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    block = SignedBlock(
        torch.rand(rows, columns, generator=generator) < 0.5,
        torch.randn(rows, rank, generator=generator).half(),
        torch.randn(columns, rank, generator=generator).half(),
    )
    raw = join_block(block)
    assert raw.shape == (block_bytes((rows, columns), rank),)
    for given_, found in zip(block, split_block(raw, (rows, columns), rank), strict=True):
        assert torch.equal(given_, found)


def test_blocks_are_those_of_the_formula() -> None:
    """A small matrix, whose decomposition is exact, against numpy's, with what is stored taken off each time."""
    weight, sizes = weights(14, 9), torch.linspace(0.5, 2.0, 9)
    found = signed_blocks(weight, sizes, rank=2, count=4)
    rest, s = weight.double().numpy() * sizes.numpy(), sizes.numpy()
    for block in found:
        u, values, v = np.linalg.svd(np.abs(rest), full_matrices=False)
        best = (u[:, :2] * values[:2]) @ v[:2]
        stored = block.u.double().numpy() @ block.v.double().numpy().T
        np.testing.assert_allclose(stored * s, best, atol=3e-3 * np.abs(best).max())
        assert np.array_equal(block.is_negative.numpy(), rest < 0)
        rest = rest - np.where(rest < 0, -1, 1) * stored * s
    assert np.square(rest).sum() < 0.1 * np.square(weight.numpy() * s).sum()


@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (96, 64), (40, 200)])
def test_what_is_left_never_grows_and_is_the_difference(shape: tuple[int, int]) -> None:
    weight, stats = weights(*shape), stats_of(shape[1])
    packed = BitStack(blocks=10).pack(weight, stats)
    sizes = stats.norm2.sqrt()
    left = [float((weight * sizes).square().sum())]
    total = torch.zeros(shape)
    for count, part in enumerate(packed.parts(), 1):
        total += part.values()
        assert torch.equal(first(packed, count).unpack(), total)
        left.append(float(((weight - total) * sizes).square().sum()))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(left))
    assert left[-1] < 0.02 * left[0]


def test_thin_factors_are_nearly_the_best_ones() -> None:
    matrix = weights(120, 90).abs()
    u, sizes, v = torch.linalg.svd(matrix)
    best = (matrix - (u[:, :4] * sizes[:4]) @ v[:4]).square().sum()
    left, right = magnitudes(matrix, 4, seed=0)
    found = (matrix - left @ right.T).square().sum()
    assert float(best) <= float(found) <= 1.03 * float(best)
    # Square roots of the sizes on both sides.
    torch.testing.assert_close(left.square().sum(dim=0), right.square().sum(dim=0), rtol=1e-3, atol=1e-6)


def test_signs_apart_keep_more_than_factors_alone() -> None:
    """The paper's reason for absolute values: at equal bytes a plain truncated decomposition is far worse."""
    weight = weights(256, 256)
    packed = BitStack(blocks=3, scale="none").pack(weight)
    rank = round(8 * packed.nbytes() / (16 * 512))
    left, right = magnitudes(weight, rank, seed=0)
    error = (packed.unpack() - weight).norm() / (left @ right.T - weight).norm()
    assert float(error) <= 0.6


def test_columns_with_large_inputs_are_exacter() -> None:
    weight, stats = weights(64, 96), Stats(96)
    stats.add(torch.randn(200, 96) * torch.logspace(-1, 1, 96))

    def error(scale: str) -> float:
        packed = FORMATS.parse(f"bitstack:blocks=2,scale={scale}").pack(weight, stats)
        return float(((packed.unpack() - weight).square() * stats.norm2).sum())

    assert error("norms") < 0.95 * error("none")


@pytest.mark.parametrize("shape", [(1, 32), (37, 160), (16, 64), (20, 45)])
@pytest.mark.parametrize("rank", [1, 3, 4, 16])
def test_products_selections_and_files_agree_with_unpack(shape: tuple[int, int], rank: int) -> None:
    packed = BitStack(blocks=3, rank=rank, scale="none").pack(weights(*shape))
    dense = packed.unpack()
    ids = torch.tensor([[shape[0] - 1, 0], [0, 0]])
    assert torch.equal(packed.unpack_rows(ids), dense[ids])
    assert torch.equal(packed.select(ids[0]).unpack(), dense[ids[0]])
    again = BlockStack.from_tensors(packed.shape, packed.settings(), packed.tensors())
    assert torch.equal(again.unpack(), dense)
    bits = BitStack(blocks=3, rank=rank).bits_per_weight(shape)
    assert packed.nbytes() * 8 == pytest.approx(bits * math.prod(shape))
    whole = torch.randn(33, shape[1], generator=torch.Generator().manual_seed(0))
    for batch in (0, 1, 2, 5, 33):
        x = whole[:batch]
        torch.testing.assert_close(packed.matmul(x), x @ dense.T, rtol=TOLERANCE, atol=TOLERANCE)


def test_blocks_that_are_let_go_of_come_back_the_same() -> None:
    packed = BitStack(blocks=5, scale="none").pack(weights(40, 96))
    x, blocks = torch.randn(3, 96), packed.blocks
    whole = packed.matmul(x)
    packed.hold(blocks[:2])
    assert packed.nbytes() == 2 * packed.block_bytes
    torch.testing.assert_close(packed.matmul(x), x @ packed.unpack().T, rtol=TOLERANCE, atol=TOLERANCE)
    packed.hold(blocks)
    assert torch.equal(packed.matmul(x), whole)
    for wrong in ([], [*blocks, blocks[0]], [blocks[0][:-1]], [blocks[0].to(torch.int8)]):
        with pytest.raises(ConfigError):
            packed.hold(wrong)
    assert torch.equal(packed.matmul(x), whole)


def test_matrices_of_nothing_are_kept() -> None:
    assert not BitStack(blocks=2, scale="none").pack(torch.zeros(20, 32)).unpack().any()
    stats = Stats(32)
    stats.add(torch.zeros(4, 32))
    assert torch.isfinite(BitStack(blocks=2).pack(weights(20, 32), stats).unpack()).all()


def test_the_rank_keeps_to_the_overhead() -> None:
    assert [BitStack().rank_of(shape) for shape in [(576, 576), (192, 576), (1536, 576), (4096, 4096), (1, 1)]] == [
        4, 2, 6, 16, 1,
    ]  # fmt: skip
    assert BitStack(rank=7).rank_of((576, 576)) == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitStack(blocks=0), "blocks"),
        (lambda: BitStack(rank=17), "rank"),
        (lambda: BitStack(budget="64 M B"), "MiB"),
        (lambda: BitStack(budget="64MB", bits=3.0), "not both"),
        (lambda: BitStack().pack(weights(4, 32)), "calibration text"),
        (lambda: BitStack(bits=3.0).pack(weights(4, 32), stats_of(32)), "whole stack"),
        (lambda: BitStack(scale="none").pack(torch.full((4, 32), torch.inf)), "NaN"),
        (lambda: BlockStack.from_tensors((4, 32), {"rank": 99, "depth": 1}, {}), "rank 99"),
        (lambda: BlockStack.from_tensors((4, 32), {"rank": 1, "depth": 1}, {"u": torch.zeros(1)}), "block0"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_sizes_are_read() -> None:
    assert [bytes_of(size) for size in (5, "5", "64MB", "1.5 kB", "2MiB")] == [
        5,
        5,
        64_000_000,
        1500,
        2 << 20,
    ]
    for wrong in ("", "-1", "64 M B", "0", "1e9", "3TB", "x"):
        with pytest.raises(ConfigError, match="MiB"):
            bytes_of(wrong)
