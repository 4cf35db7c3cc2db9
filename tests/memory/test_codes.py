"""Packed codes keep every code, and numbers stay within half a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import ConfigError
from plait.memory.codes import WIDTHS, AffineCodes, pack, unpack

EXAMPLES = settings(deadline=None, max_examples=60, derandomize=True)
HALF_STEP = 0.5 + 1e-3


def numbers(tokens: int, channels: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=generator) * scale


@EXAMPLES
@given(
    bits=st.sampled_from(WIDTHS), length=st.integers(0, 40), axis=st.integers(-2, 1), seed=st.integers(0, 99)
)
def test_packed_codes_are_read_back(bits: int, length: int, axis: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = [3, 3]
    shape[axis] = length
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits, axis)
    assert packed.shape[axis] == -(-length // 8) * bits
    assert torch.equal(unpack(packed, bits, length, axis), codes)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2, 3, 0, 0, 0, 0, 1], dtype=torch.uint8), 2).tolist() == [
        0b00111001,
        0b01000000,
    ]
    assert pack(torch.tensor([1, 2, 4, 0, 0, 0, 0, 7], dtype=torch.uint8), 3).tolist() == [
        0b00010001,
        1,
        0b11100000,
    ]


@EXAMPLES
@given(
    bits=st.sampled_from(WIDTHS),
    tokens=st.integers(1, 20),
    group=st.sampled_from([1, 3, 8, 64]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-6, 1.0, 5000.0]),
    shift=st.sampled_from([0.0, 3.0, -900.0]),
)
def test_every_number_is_within_half_a_step(
    bits: int, tokens: int, group: int, seed: int, scale: float, shift: float
) -> None:
    matrix = numbers(tokens, 12, seed, scale) + shift
    coded = AffineCodes.of(matrix, bits, "tokens", group)
    for first in range(0, tokens, group):
        part = matrix[first : first + group]
        # The minimum was rounded down to fp16, by at most 2^-10 of it, or by the smallest fp16.
        low = part.amin(0) - part.amin(0).abs() * 2**-10 - 2**-24
        step = (part.amax(0) - low) / (2**bits - 1) * (1 + 2**-10) + 2**-24
        error = (coded.rows(first, min(first + group, tokens)) - part).abs()
        assert bool((error <= step * HALF_STEP + part.abs() * 1e-6).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_groups_of_channels_have_a_step_of_their_own(bits: int) -> None:
    matrix = torch.cat([numbers(5, 4, 0), numbers(5, 4, 1, scale=100.0)], dim=1)
    coded = AffineCodes.of(matrix, bits, "channels", 4)
    error = (coded.rows(0, 5) - matrix).abs().view(5, 2, 4).amax(2)
    width = matrix.view(5, 2, 4).amax(2) - matrix.view(5, 2, 4).amin(2)
    assert bool((error <= width / (2**bits - 1) * 0.51 + 1e-3).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_constant_group_is_kept_exactly_where_fp16_holds_it(bits: int) -> None:
    matrix = torch.tensor([[0.0, 1.5, -2048.0]] * 4)
    assert torch.equal(AffineCodes.of(matrix, bits, "tokens", 4).rows(0, 4), matrix)


@EXAMPLES
@given(
    along=st.sampled_from(["tokens", "channels"]),
    low=st.integers(0, 19),
    size=st.integers(1, 20),
    bits=st.sampled_from(WIDTHS),
)
def test_a_cut_reads_the_same_numbers_from_less(along: str, low: int, size: int, bits: int) -> None:
    coded = AffineCodes.of(numbers(20, 12, 3), bits, along, 4)  # type: ignore[arg-type]
    high = min(low + size, 20)
    piece = coded.cut(low, high)
    assert torch.equal(piece.rows(0, high - low), coded.rows(low, high))
    last = piece.cut((high - low) // 2, high - low)
    assert torch.equal(last.rows(0, len(last)), coded.rows(low + (high - low) // 2, high))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in piece.tensors())
    assert len(piece) == high - low


def test_joined_parts_read_like_the_whole() -> None:
    matrix = numbers(22, 12, 4)
    whole = AffineCodes.of(matrix, 3, "tokens", 4)
    parts = [AffineCodes.of(matrix[low:high], 3, "tokens", 4) for low, high in ((0, 8), (8, 12), (12, 22))]
    assert torch.equal(AffineCodes.joined(parts).rows(0, 22), whole.rows(0, 22))


def test_bytes_are_those_of_codes_and_steps() -> None:
    coded = AffineCodes.of(numbers(64, 16, 5), 4, "tokens", 32)
    assert sum(tensor.nbytes for tensor in coded.tensors()) == 64 * 16 // 2 + 2 * 2 * 16 * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 70000.0])
def test_what_fp16_cannot_hold_is_refused(bad: float) -> None:
    matrix = numbers(4, 4, 6)
    matrix[2, 1] = bad
    with pytest.raises(ConfigError, match=r"finite numbers up to 65,504"):
        AffineCodes.of(matrix, 4, "tokens", 4)


def test_bad_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2, 3, 4 or 8 bits. Got 5"):
        pack(torch.zeros(8, dtype=torch.uint8), 5)
    with pytest.raises(ConfigError, match=r"must divide their number 12. Got 8"):
        AffineCodes.of(numbers(4, 12, 7), 4, "channels", 8)
