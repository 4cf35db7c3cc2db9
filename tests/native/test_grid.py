"""Matrices of low-bit codes: exact values, bounds on products, one result for a row however it comes."""

from __future__ import annotations

import pytest
import torch
from native_support import extension, int8_bound, isas, running, switched_off

from plait.ops import GridMatrix
from plait.weights import GRIDS, Coded
from plait.weights.coded import from_groups, num_groups

pytestmark = switched_off

# Grid, group, whether it has zeros.
KINDS = [
    *((f"uniform{bits}", 64, zeros) for bits in (2, 3, 4, 8) for zeros in (True, False)),
    ("uniform2", 0, True),
    ("uniform4", 96, True),
    *((name, 64, False) for name in ("fp3", "fp4", "bitmod3", "bitmod4", "nf4")),
    ("bitmod3", 128, False),
    ("planes", 64, False),
    ("planes", 96, False),
]


def random_matrix(
    name: str, group: int, zeros: bool, rows: int, columns: int, extreme: bool = False
) -> Coded:
    """Every code, type and scale; with `extreme`, all codes the largest or all the smallest."""
    grid = GRIDS[name]
    groups = num_groups(columns, group)
    codes = torch.randint(0, 1 << grid.bits, (rows, columns)).to(torch.uint8)
    if extreme:
        codes[:] = torch.where(torch.rand(rows, 1) < 0.5, 0, (1 << grid.bits) - 1)
    if grid.has_planes:
        scales, low_scales = (torch.randn(2, rows, groups) * 0.02).half()
        return from_groups(grid, group, codes, scales, low_scales=low_scales)
    if not grid.values:
        scales = (torch.randn(rows, groups) * 0.02).half()
        high = 2.0**grid.bits
        return from_groups(
            grid, group, codes, scales, zeros=(torch.rand(rows, groups) * high).half() if zeros else None
        )
    return from_groups(
        grid,
        group,
        codes,
        torch.randint(0, 256, (rows, groups)).to(torch.uint8),
        types=torch.randint(0, 4, (rows, groups)).to(torch.uint8) if grid.specials else None,
        row_scales=torch.rand(rows) * 1e-4,
    )


@pytest.mark.parametrize(("name", "group", "zeros"), KINDS)
def test_native_rows_are_the_values_of_the_codes(name: str, group: int, zeros: bool) -> None:
    matrix = random_matrix(name, group, zeros, 37, 160)
    wanted = matrix.unpack()
    native = matrix.to_native()
    assert torch.equal(native.unpack_rows(torch.arange(37)), wanted)
    # Still that of the tensors, which are not copied.
    assert native.nbytes() == 0
    assert torch.equal(matrix.unpack(), wanted)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(("name", "group", "zeros"), KINDS)
def test_products_are_within_their_bounds(
    name: str, group: int, zeros: bool, extreme: bool, isa: str
) -> None:
    for rows, columns, batch in [(1, 32, 1), (37, 96, 7), (50, 192, 33)]:
        matrix = random_matrix(name, group, zeros, rows, columns, extreme)
        weight = matrix.unpack().double()
        x = torch.randn(batch, columns)
        x[0] = 3.0  # every code of the row becomes the largest
        x[-1] *= 1e3
        x[-1, 5] = 1e7  # one huge outlier
        native = matrix.to_native()
        assert isinstance(native, GridMatrix)
        with running(isa=isa):
            rounded, exact = native.matmul(x), native.matmul_exact(x)
        wanted = x.double() @ weight.T
        # fp32 sums of as many products, of codes that may be larger than the weights they stand for.
        largest = 2.0 ** GRIDS[name].bits * float(matrix.unpack().abs().amax() + 1e-9)
        size = x.double().abs().sum(dim=1, keepdim=True) * largest
        bound = int8_bound(x, weight.float()) + 1e-6 * size
        assert bool(((rounded.double() - wanted).abs() <= bound).all())
        assert bool(((exact.double() - wanted).abs() <= 1e-6 * size + 1e-12).all())


@pytest.mark.parametrize(("name", "group", "zeros"), KINDS)
def test_every_instruction_set_batch_and_number_of_threads_gives_the_same_bits(
    name: str, group: int, zeros: bool
) -> None:
    matrix = random_matrix(name, group, zeros, 53, 128).to_native()
    assert isinstance(matrix, GridMatrix)
    x = torch.randn(15, 128)
    for multiply in (matrix.matmul, matrix.matmul_exact):
        alone = torch.cat([multiply(row[None]) for row in x])
        for isa in extension().isas():
            with running(isa=isa, threads=2):
                assert torch.equal(multiply(x), alone)
                assert torch.equal(torch.cat([multiply(x[:6]), multiply(x[6:])]), alone)


def test_grids_and_blocks_may_be_parts_of_one_projection() -> None:
    from plait.ops.native import Projection

    first, second = random_matrix("bitmod3", 64, False, 48, 64), random_matrix("uniform2", 64, True, 20, 64)
    x = torch.randn(5, 64)
    together = Projection([first.to_native(), (second.to_native(), 0, 20)])(x)
    assert torch.equal(together, torch.cat([first.matmul(x), second.matmul(x)], dim=-1))


def test_arrays_that_do_not_fit_are_refused() -> None:
    matrix = random_matrix("bitmod4", 64, False, 20, 64)
    good = [
        20, 64, 4, 64, matrix.codes, matrix.scales, None, matrix.types, matrix.row_scales,
        list(matrix.grid.values), list(matrix.grid.specials),
    ]  # fmt: skip
    assert extension().GridMatrix(*good).shape == (20, 64)
    for place, wrong, message in [
        (1, 63, "multiple of 32"),
        (2, 5, "2, 3, 4 or 8"),
        (3, 48, "multiple of 32"),
        (4, matrix.codes[:1], "codes must have shape"),
        (5, matrix.scales.float(), "uint8"),
        (7, None, "special values"),
        (8, None, "float16"),
        (9, [0, 1], "one value for each code"),
        (9, [17] * 16, r"\[-16, 16\]"),
        (9, [2113] * 16, r"\[-16, 16\]"),
        (10, [17] * 4, r"\[-16, 16\]"),
    ]:
        given = list(good)
        given[place] = wrong
        with pytest.raises(ValueError, match=message):
            extension().GridMatrix(*given)


def test_wide_tables_that_do_not_fit_are_refused() -> None:
    matrix = random_matrix("nf4", 64, False, 20, 64)
    values = list(matrix.grid.values)
    good = [20, 64, 4, 64, matrix.codes, matrix.scales, None, None, matrix.row_scales, values, []]
    assert extension().GridMatrix(*good).shape == (20, 64)
    for wrong in (2113, -2113):
        with pytest.raises(ValueError, match=r"\[-2112, 2112\]"):
            extension().GridMatrix(*good[:9], [*values[:-1], wrong], [])
    three = random_matrix("fp3", 64, False, 20, 64)
    with pytest.raises(ValueError, match="beyond"):
        extension().GridMatrix(
            20, 64, 3, 64, three.codes, three.scales, None, None, three.row_scales, values[:8], []
        )
