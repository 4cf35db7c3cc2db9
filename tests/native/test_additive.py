"""Vector codes: one result for a row however it comes, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from native_support import extension, isas, running, switched_off

from plait.ops import AdditiveMatrix
from plait.ops.native import Projection, feed_forward
from plait.weights import Additive

pytestmark = switched_off


def random_codes(rows: int, columns: int, width: int, books: int) -> Additive:
    return Additive(
        (rows, columns),
        torch.randint(0, 256, (rows, columns // width, books), dtype=torch.uint8),
        (torch.randn(books, 256, width) * 0.1).half(),
        (torch.randn(rows) + 2).half(),
    )


@pytest.mark.parametrize(
    ("width", "books"), [(1, 1), (3, 2), (4, 1), (4, 3), (6, 1), (8, 1), (8, 2), (8, 5), (16, 2), (48, 2)]
)
def test_every_way_gives_a_row_the_same_bits(width: int, books: int) -> None:
    torch.manual_seed(width)
    packed = random_codes(37, 288, width, books)
    native = packed.to_native()
    assert isinstance(native, AdditiveMatrix)
    assert native.nbytes() == 0
    x = torch.randn(150, 288)
    exact, rounded = native.matmul_exact(x), native.matmul(x)
    assert torch.equal(packed.matmul(x), exact)
    # The same numbers to the bit; only their products are added in another order.
    torch.testing.assert_close(exact, x @ packed.unpack().T, rtol=1e-5, atol=1e-4)
    # 15 bits of activations; the block's largest is at most some four times the mean.
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=5e-3)
    for isa in isas():
        for threads in (1, 3):
            with running(isa=isa, threads=threads):
                for few in (1, 2, 5, 8, 13, 150):
                    assert torch.equal(native.matmul_exact(x[:few]), exact[:few])
                    assert torch.equal(native.matmul(x[:few]), rounded[:few])
                assert torch.equal(native.unpack_rows(torch.arange(37)), packed.unpack())


@pytest.mark.parametrize(("rows", "batch"), [(0, 3), (1, 0), (1, 1), (17, 2), (70, 33)])
def test_odd_sizes_and_rows_with_gaps_between_them(rows: int, batch: int) -> None:
    torch.manual_seed(rows)
    packed = random_codes(rows, 32, 8, 2)
    wide = torch.randn(batch, 40)
    x = wide[:, 3:35]
    torch.testing.assert_close(packed.matmul(x), x @ packed.unpack().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.matmul(x[None]), (x @ packed.unpack().T)[None], rtol=1e-5, atol=1e-5)


def test_columns_that_are_no_multiple_of_32_are_multiplied_piece_by_piece() -> None:
    packed, x = random_codes(20, 40, 8, 2), torch.randn(3, 40)
    assert not packed.has_native_form
    torch.testing.assert_close(packed.matmul(x), x @ packed.unpack().T)


def test_a_gated_feed_forward_reads_vector_codes() -> None:
    torch.manual_seed(1)
    gate, up, down = random_codes(96, 64, 8, 2), random_codes(96, 64, 4, 1), random_codes(64, 96, 8, 2)
    x = torch.randn(270, 64)
    projections = [Projection([packed.to_native()]) for packed in (gate, up, down)]
    found = feed_forward(x, *projections, "silu")
    inner = torch.nn.functional.silu(x @ gate.unpack().T) * (x @ up.unpack().T)
    torch.testing.assert_close(found, inner @ down.unpack().T, rtol=1e-3, atol=1e-2)
    for few in (1, 3, 9):
        assert torch.equal(feed_forward(x[:few], *projections, "silu"), found[:few])


def test_wrong_tensors_are_refused() -> None:
    module = extension()
    codes, books = torch.zeros(20, 8, 2, dtype=torch.uint8), torch.zeros(2, 256, 8).half()
    scales = torch.ones(20).half()
    for wrong, match in (
        ((20, 64, codes[:, :7], books, scales), "codes must have shape"),
        ((20, 64, codes.int(), books, scales), "codes must be uint8"),
        ((20, 64, codes, books[:, :255], scales), "books must have shape"),
        ((20, 64, codes, books[..., :7].contiguous(), scales), "cut the columns"),
        ((20, 64, codes, books.float(), scales), "books must be float16"),
        ((20, 64, codes, books, scales[:19]), "scales must have shape"),
        ((20, 40, codes, books, scales), "32 columns"),
    ):
        with pytest.raises(ValueError, match=match):
            module.AdditiveMatrix(*wrong)
    matrix = module.AdditiveMatrix(20, 64, codes, books, scales)
    with pytest.raises(ValueError, match="x must have shape"):
        module.additive_exact(matrix, torch.zeros(1, 32), torch.zeros(1, 20))
