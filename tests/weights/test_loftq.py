"""LoftQ: the nearest product, and matrices that are rounded so that one can make up for the rest."""

from __future__ import annotations

import pytest
import torch
from test_coded import weights

from plait.errors import ConfigError
from plait.weights import LoftQ, Packed, Uniform
from plait.weights.loftq import nearest_product


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (16, 16)])
def test_the_nearest_product_is_that_of_the_first_singular_triplets(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    down, up = nearest_product(matrix, 5)
    assert (down.shape, up.shape) == ((5, shape[1]), (shape[0], 5))
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close((up @ down).double(), (u[:, :5] * s[:5]) @ v[:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_a_matrix_of_lower_rank_has_a_finite_product() -> None:
    for matrix in (torch.zeros(8, 12), torch.outer(torch.randn(8), torch.randn(12))):
        down, up = nearest_product(matrix, 4)
        torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", ["bits=2", "bits=3,grid=bitmod", "bits=4,grid=nf4,group=0"])
def test_rounds_leave_less_than_the_first_rounding_with_a_product(settings: str) -> None:
    format = LoftQ.from_settings(dict(part.split("=") for part in f"{settings},rank=8".split(",")))
    weight = weights(96, 128)

    def left(packed: Packed) -> float:
        rest = weight - packed.unpack()
        down, up = nearest_product(rest, 8)
        return float((rest - up @ down).norm())

    plain = format.base.pack(weight)
    found = format.pack(weight)
    assert left(found) < 0.99 * left(plain) < float((weight - plain.unpack()).norm())
    assert found.nbytes() == plain.nbytes()
    assert format.bits_per_weight((96, 128)) == format.base.bits_per_weight((96, 128))


def test_one_round_is_the_grid() -> None:
    weight = weights(32, 64)
    assert torch.equal(LoftQ(bits=3, rounds=1).pack(weight).unpack(), Uniform(bits=3).pack(weight).unpack())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"LoftQ\.rank must be at most 8.*8 x 64.*Got 16"):
        LoftQ().pack(weights(8, 64))
    with pytest.raises(ConfigError, match=r"LoftQ\.bits must be 3 or 4 with grid=bitmod"):
        LoftQ(bits=2, grid="bitmod")
    with pytest.raises(ConfigError, match=r"LoftQ\.bits must be 4 with grid=nf4"):
        LoftQ(bits=3, grid="nf4")
    with pytest.raises(ConfigError, match="finite"):
        LoftQ(rank=2).pack(torch.full((4, 64), torch.nan))
