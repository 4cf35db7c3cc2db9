"""Products of single bits: whole numbers, the same on every instruction set and without the extension."""

from __future__ import annotations

import pytest
import torch
from native_support import isas, running, switched_off
from torch import Tensor

from plait import ops
from plait.ops import native


def signs(rows: int, columns: int, seed: int) -> Tensor:
    return torch.where(
        torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0
    )


def tiles_of(weight: Tensor) -> Tensor:
    """Words of a matrix of -1 and 1, (T, W, 16); rows that fill up the last tile hold ones, which nobody may read."""
    words = ops.words_of_bits(weight < 0)
    tiles = -(-len(words) // ops.WORD_TILE)
    filled = torch.full((tiles * ops.WORD_TILE, words.shape[1]), -1, dtype=torch.int64)
    filled[: len(words)] = words
    return filled.view(tiles, ops.WORD_TILE, -1).transpose(1, 2).contiguous()


# A byte of a vector counts up to 248: 31 and 32 words lie on either side of its widening.
SHAPES = [(1, 1, 1), (3, 5, 65), (2, 16, 64), (7, 33, 31 * 64), (5, 20, 32 * 64 + 1), (1, 40, 4099)]


@switched_off
@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_bits_multiply_as_whole_numbers(rows: int, outputs: int, columns: int) -> None:
    x, weight = signs(rows, columns, 0), signs(outputs, columns, 1)
    scales = torch.linspace(0.5, 2.0, outputs)
    wanted = scales * (x @ weight.T)
    tiles, words = tiles_of(weight), ops.words_of_bits(x < 0)
    for isa in isas():
        for threads in (1, 3):
            with running(isa=isa, threads=threads):
                matrix = ops.BitMatrix(tiles, columns, scales)
                assert torch.equal(ops.sign_words(x), words)
                assert torch.equal(matrix.product(words), wanted)
                assert torch.equal(matrix.linear(x, None), wanted)
                half = torch.full((columns,), 0.5)
                assert torch.equal(matrix.linear(x, half), wanted)


@switched_off
@pytest.mark.parametrize("columns", [31 * 64, 100 * 64])
def test_no_count_runs_over(columns: int) -> None:
    x, weight = torch.ones(2, columns), -torch.ones(17, columns)
    for isa in isas():
        with running(isa=isa):
            found = ops.BitMatrix(tiles_of(weight), columns, torch.ones(17)).product(ops.sign_words(x))
            assert torch.equal(found, torch.full((2, 17), -float(columns)))


@switched_off
@pytest.mark.parametrize("columns", [1, 7, 8, 64, 65, 200])
def test_zeros_are_positive_and_nan_is_not(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randint(-1, 2, (6, columns), generator=generator) / 2
    x[0, 0], x[1, -1], x[2, 0] = -0.0, float("nan"), float("inf")
    shift = torch.randint(-1, 2, (columns,), generator=generator) / 2
    for by in (None, shift):
        wanted = ops.words_of_bits(~((x if by is None else x + by) >= 0))
        for isa in isas():
            with running(isa=isa):
                assert torch.equal(ops.sign_words(x, by), wanted)
                # Rows that do not lie side by side.
                assert torch.equal(ops.sign_words(x.T.contiguous().T, by), wanted)
    assert ops.bits_of_words(ops.sign_words(x))[0, 0] == 0
    assert ops.bits_of_words(ops.sign_words(x))[1, columns - 1] == 1


def test_the_reference_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scales = signs(5, 130, 2), signs(19, 130, 3), torch.rand(19)
    with monkeypatch.context() as patch:
        patch.setattr(native, "module", lambda: None)
        plain = ops.BitMatrix(tiles_of(weight), 130, scales).linear(x, torch.full((130,), 0.5))
    native_words = ops.sign_words(x, torch.full((130,), 0.5))
    assert torch.equal(plain, scales * (x @ weight.T))
    assert torch.equal(ops.BitMatrix(tiles_of(weight), 130, scales).product(native_words), plain)


@switched_off
def test_arrays_that_do_not_fit_are_refused() -> None:
    tiles, words = tiles_of(signs(20, 70, 0)), ops.words_of_bits(signs(3, 70, 1) < 0)
    matrix = ops.BitMatrix(tiles, 70, torch.ones(20))
    with pytest.raises(ValueError, match="as many numbers as the matrix has columns"):
        matrix.linear(torch.ones(2, 71), None)
    with pytest.raises(ValueError, match=r"weight must have shape \(1, any, 16\)"):
        ops.BitMatrix(tiles, 70, torch.ones(16))
    with pytest.raises(ValueError, match=r"x must have shape \(any, 2\)"):
        matrix.product(words[:, :1])
    with pytest.raises(ValueError, match="more columns than bits"):
        ops.BitMatrix(tiles, 129, torch.ones(20))
    with pytest.raises(ValueError, match="x must be int64"):
        matrix.product(words.int())
    with pytest.raises(ValueError, match=r"shift must have shape \(70\)"):
        ops.sign_words(torch.ones(2, 70), torch.ones(3))
