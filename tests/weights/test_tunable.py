"""Packed matrices as they are tuned: the same values, true gradients, nearest codes, and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_coded import stats_of, weights

from plait.errors import ConfigError, IncompatibleError
from plait.weights import FORMATS, VQ, Additive, Packed, Tunable, tunable
from plait.weights.codebooks import beam_search, k_means

KINDS = [
    "uniform:bits=2,group=40",
    "uniform:bits=4,symmetric=true",
    "decoupleq:bits=2,epochs=0",
    "bitmod:bits=3",
    "bitmod:bits=4,types=none",
    "nf4",
    "db-llm",
    "vq:books=2,group=8",
    "vq:books=1,group=4",
]


def packed_in(spec: str, rows: int = 48, columns: int = 128) -> Packed:
    return FORMATS.parse(spec).pack(weights(rows, columns), stats_of(columns))


@pytest.mark.parametrize("spec", KINDS)
def test_a_matrix_is_the_same_while_it_is_tuned_and_after(spec: str) -> None:
    packed = packed_in(spec)
    matrix = tunable(packed, "m")
    dense = packed.unpack()
    torch.testing.assert_close(matrix.dense().detach(), dense, rtol=1e-5, atol=1e-7)
    again = matrix.packed()
    assert again.nbytes() == packed.nbytes()
    assert again.settings() == packed.settings()
    # Zeros are kept in fp16 relative to scales, and those in units.
    torch.testing.assert_close(again.unpack(), dense, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("spec", KINDS)
def test_gradients_of_numbers_are_those_of_finite_differences(spec: str) -> None:
    matrix = tunable(packed_in(spec, 40, 64), "m").double()
    slope = torch.randn(40, 64, dtype=torch.float64)
    (matrix.dense() * slope).sum().backward()
    for parameter in matrix.parameters():
        assert parameter.grad is not None
        for place in torch.randint(0, parameter.numel(), (4,)).tolist():
            with torch.no_grad():
                flat, values = parameter.view(-1), []
                for sign in (1, -1):
                    flat[place] += sign * 1e-4
                    values.append(float((matrix.dense() * slope).sum()))
                    flat[place] -= sign * 1e-4
            wanted = (values[0] - values[1]) / 2e-4
            assert float(parameter.grad.view(-1)[place]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("spec", KINDS)
def test_codes_are_the_nearest_and_stay_where_none_is_nearer(spec: str) -> None:
    matrix = tunable(packed_in(spec), "m")
    groups = torch.randperm(len(matrix.codes))[:200]
    present = matrix.decoded(matrix.codes[groups], groups)
    assert torch.equal(present, matrix.dense().detach().reshape(-1, matrix.width)[groups]) or torch.allclose(
        present, matrix.dense().detach().reshape(-1, matrix.width)[groups], atol=1e-7
    )
    assert torch.equal(matrix.nearest(present, groups), matrix.codes[groups])
    target = present + 0.05 * torch.randn(present.shape)
    found = matrix.decoded(matrix.nearest(target, groups), groups)
    assert bool(
        ((found - target).square().sum(dim=1) <= (present - target).square().sum(dim=1) + 1e-12).all()
    )
    if matrix.codes.shape[1] == 1 and matrix.width == 1:
        bits = 1 << matrix.grid.bits  # type: ignore[union-attr]
        # The last code of a table without special values is never used.
        bits -= "types=none" in spec
        every = torch.stack(
            [matrix.decoded(torch.full((200, 1), code, dtype=torch.uint8), groups) for code in range(bits)]
        )
        best = (every - target).abs().amin(dim=0)
        torch.testing.assert_close((found - target).abs(), best)


def test_a_beam_as_wide_as_a_codebook_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    books, target = torch.randn(2, 16, 4, generator=generator), torch.randn(60, 4, generator=generator)
    codes = beam_search(target, books, width=16).long()
    found = (books[0][codes[:, 0]] + books[1][codes[:, 1]] - target).square().sum(dim=1)
    best = torch.stack(
        [
            (books[0][i] + books[1][j] - target).square().sum(dim=1)
            for i, j in itertools.product(range(16), repeat=2)
        ]
    ).amin(dim=0)
    torch.testing.assert_close(found, best)


def test_centres_that_lose_all_points_are_put_on_far_ones() -> None:
    points = torch.cat([torch.zeros(50, 2), torch.ones(1, 2) * 9, torch.ones(1, 2) * -9])
    centres = k_means(points, 3, seed=0)
    error = (points[:, None] - centres).square().sum(dim=2).amin(dim=1)
    assert float(error.max()) < 1e-9


def test_vector_codes_keep_their_promises() -> None:
    weight = weights(64, 128)
    packed = VQ(group=4).pack(weight)
    assert packed.unpack().shape == (64, 128)
    error = [
        float((VQ(books=books, group=4).pack(weight).unpack() - weight).square().mean()) for books in (1, 2)
    ]
    assert error[1] < 0.3 * error[0]
    assert VQ(group=4).bits_per_weight((64, 128)) == pytest.approx(8 * packed.nbytes() / weight.numel())
    again = Additive.from_tensors(packed.shape, packed.settings(), packed.tensors())
    assert torch.equal(again.unpack(), packed.unpack())
    x = torch.randn(3, 128)
    torch.testing.assert_close(again.matmul(x), x @ packed.unpack().T)
    ids = torch.tensor([[5, 0], [63, 5]])
    assert torch.equal(packed.unpack_rows(ids), packed.unpack()[ids])
    assert torch.equal(packed.select(torch.tensor([9, 3])).unpack(), packed.unpack()[[9, 3]])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="divide"):
        VQ(group=8).pack(weights(64, 60))
    with pytest.raises(ConfigError, match="as many runs"):
        VQ(group=8).pack(weights(4, 64))
    with pytest.raises(ConfigError, match="codebooks have shape"):
        Additive((4, 9), torch.zeros(4, 1, 2).byte(), torch.zeros(2, 256, 8).half(), torch.zeros(4).half())
    with pytest.raises(ConfigError, match="codes are"):
        Additive((4, 8), torch.zeros(4, 2, 2).byte(), torch.zeros(2, 256, 8).half(), torch.zeros(4).half())
    with pytest.raises(IncompatibleError, match=r"head is in q8_0.*db-llm"):
        tunable(FORMATS.parse("q8_0").pack(weights(4, 64)), "head")
    assert isinstance(packed_in("db-llm").tunable(), Tunable)
