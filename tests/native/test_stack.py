"""Sums of blocks: one result for a row however it comes, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from native_support import extension, isas, running, switched_off

from plait.ops import StackMatrix
from plait.ops.native import Projection, feed_forward
from plait.weights import BlockStack
from plait.weights.stacked_blocks import SignedBlock, block_bytes, join_block

pytestmark = switched_off


def random_stack(rows: int, columns: int, rank: int, count: int) -> BlockStack:
    blocks = [
        join_block(
            SignedBlock(
                torch.rand(rows, columns) < 0.5,
                torch.randn(rows, rank).half(),
                (torch.randn(columns, rank) * 0.1).half(),
            )
        )
        for _ in range(count)
    ]
    return BlockStack((rows, columns), rank, blocks, count)


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 6, 16])
def test_every_way_gives_a_row_the_same_bits(rank: int) -> None:
    torch.manual_seed(rank)
    stack = random_stack(37, 288, rank, 3)
    native = stack.to_native()
    assert isinstance(native, StackMatrix)
    assert native.nbytes() == 0
    x = torch.randn(300, 288)
    exact, rounded = native.matmul_exact(x), native.matmul(x)
    # 15 bits of activations; the block's largest is at most some four times the mean.
    torch.testing.assert_close(exact, x @ stack.unpack().T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=5e-3)
    for isa in isas():
        for threads in (1, 3):
            with running(isa=isa, threads=threads):
                for few in (1, 2, 5, 8, 13):
                    assert torch.equal(native.matmul_exact(x[:few]), exact[:few])
                    assert torch.equal(native.matmul(x[:few]), rounded[:few])
                # More rows than meet one made tile together.
                assert torch.equal(native.matmul(x), rounded)
                torch.testing.assert_close(
                    native.unpack_rows(torch.arange(37)), stack.unpack(), rtol=1e-5, atol=1e-6
                )


def test_a_gated_feed_forward_reads_stacks() -> None:
    torch.manual_seed(1)
    gate, up, down = random_stack(96, 64, 4, 2), random_stack(96, 64, 4, 3), random_stack(64, 96, 2, 2)
    x = torch.randn(270, 64)
    projections = [Projection([stack.to_native()]) for stack in (gate, up, down)]
    found = feed_forward(x, *projections, "silu")
    inner = torch.nn.functional.silu(x @ gate.unpack().T) * (x @ up.unpack().T)
    torch.testing.assert_close(found, inner @ down.unpack().T, rtol=1e-3, atol=1e-2)
    for few in (1, 3, 9):
        assert torch.equal(feed_forward(x[:few], *projections, "silu"), found[:few])


def test_blocks_change_in_place() -> None:
    stack = random_stack(40, 64, 3, 4)
    native, x = stack.to_native(), torch.randn(2, 64)
    projection = Projection([native])
    whole = projection(x)
    stack.hold(stack.blocks[:1])
    torch.testing.assert_close(projection(x), x @ stack.unpack().T, rtol=1e-3, atol=1e-3)
    assert not torch.equal(projection(x), whole)


def test_wrong_blocks_are_refused() -> None:
    module, size = extension(), block_bytes((20, 64), 2)
    good, raw = torch.zeros(size, dtype=torch.uint8), torch.zeros(size + 1, dtype=torch.uint8)
    for blocks in ([], [good[:-1]], [good.float()], [raw[1:]]):
        with pytest.raises(ValueError, match="block"):
            module.StackMatrix(20, 64, 2, blocks)
    with pytest.raises(ValueError, match="32 columns"):
        module.StackMatrix(20, 65, 2, [good])
    with pytest.raises(ValueError, match="rank"):
        module.StackMatrix(20, 64, 17, [good])
    matrix = module.StackMatrix(20, 64, 2, [good])
    with pytest.raises(ValueError, match="x must have shape"):
        module.stack_exact(matrix, torch.zeros(1, 32), torch.zeros(1, 20))
