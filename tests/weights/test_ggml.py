"""The GGML block formats: bit-equal to the gguf package, bounded in error, and well-behaved as matrices."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import ConfigError, UnknownNameError
from plait.weights import FORMATS, Blocks, Dense, Embedding, Linear, ggml
from plait.weights import format as weights_format
from plait.weights.ggml import BLOCK_FORMATS, dequantize

QUANTIZED = ("q8_0", "q4_0", "q4_1")
PLAIN = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Largest relative and absolute error of rounding to fp16, and room for the fp32 arithmetic around it.
FP16_RELATIVE, FP16_ABSOLUTE, FP32_SLACK = 2.0**-11, 2.0**-25, 2.0**-20


def ggml_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """Any bytes at all, so also scales that are NaN, infinite, negative or subnormal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, blocks * BLOCK_FORMATS[name].nbytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def finite_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """Random bytes without the exponents that make an fp16 number NaN or infinite."""
    return random_blocks(name, rows, blocks, seed) & 0x3B


def assert_same_bits(given: torch.Tensor, expected: np.ndarray) -> None:
    assert tuple(given.shape) == expected.shape
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(given.numpy()), is_nan)
    np.testing.assert_array_equal(given.numpy().view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])


def oracle(blocks: torch.Tensor, name: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return gguf.quants.dequantize(blocks.numpy(), ggml_type(name))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_sizes_of_blocks_are_those_of_the_gguf_package(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[ggml_type(name)] == (
        BLOCK_FORMATS[name].elements,
        BLOCK_FORMATS[name].nbytes,
    )


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (37, 11), (0, 4)])
def test_dequantised_blocks_equal_the_gguf_package_bit_for_bit(name: str, shape: tuple[int, int]) -> None:
    blocks = random_blocks(name, *shape)
    rows, columns = shape[0], shape[1] * BLOCK_FORMATS[name].elements
    expected = oracle(blocks, name) if rows else np.empty((0, columns), np.float32)
    assert_same_bits(dequantize(blocks, name), expected)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_decoding_in_chunks_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(name, 9, 7)
    monkeypatch.setattr(ggml, "_DECODE_CHUNK", 256 * 5)
    assert_same_bits(dequantize(blocks, name), oracle(blocks, name))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (6, 3)])
def test_blocks_may_start_at_an_odd_address_and_be_strided(name: str, shape: tuple[int, int]) -> None:
    blocks = random_blocks(name, *shape)
    shifted = torch.cat([blocks.new_zeros(1), blocks.flatten()])[1:].view(blocks.shape)
    assert_same_bits(dequantize(shifted, name), oracle(blocks, name))
    assert_same_bits(dequantize(blocks[::2], name), oracle(blocks[::2].contiguous(), name))


@pytest.mark.parametrize("name", QUANTIZED)
def test_packed_weights_equal_the_gguf_package_bit_for_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml, "_DECODE_CHUNK", 32 * 100)
    generator = torch.Generator().manual_seed(1)
    scales = 10.0 ** torch.randint(-6, 4, (300, 1), generator=generator)
    weight = torch.randn(300, 96, generator=generator) * scales
    # Blocks of zeros, of one value, of ties between magnitudes, and of halves that must be rounded.
    weight[3], weight[4], weight[5] = 0, -0.25, torch.tensor([1.0, -1.0] * 48)
    weight[6] = torch.arange(96) % 17 - 8
    weight[7] = torch.arange(96) % 32 - 16.5
    weight[7, ::32] = 127
    weight[8, 32:64] = 0
    before = weight.clone()
    packed = FORMATS.parse(name).pack(weight)
    np.testing.assert_array_equal(
        packed.blocks.numpy(), gguf.quants.quantize(weight.numpy(), ggml_type(name))
    )
    assert torch.equal(weight, before)


BLOCKS_OF_32 = st.lists(
    st.lists(st.floats(-1000, 1000, width=32), min_size=32, max_size=32), min_size=1, max_size=3
)


def fp16_error(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers.abs() * FP16_RELATIVE).clamp(min=FP16_ABSOLUTE)


@given(BLOCKS_OF_32)
def test_q8_0_is_within_half_a_step(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows, dtype=torch.float64)
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (FORMATS.parse("q8_0").pack(weight).unpack() - weight).abs()
    assert (
        error <= 0.5 * step + 127 * fp16_error(step) + FP32_SLACK * weight.abs().amax(1, keepdim=True)
    ).all()


@given(BLOCKS_OF_32)
def test_q4_0_is_within_half_a_step_and_a_whole_one_at_the_far_end(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows, dtype=torch.float64)
    extreme = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    step = extreme.abs() / 8
    codes = torch.where(step > 0, weight / (extreme / -8), 0.0)
    allowed = torch.where(codes > 7.5, (codes - 7) * step, 0.5 * step)
    error = (FORMATS.parse("q4_0").pack(weight).unpack() - weight).abs()
    assert (error <= allowed + 8 * fp16_error(step) + FP32_SLACK * extreme.abs()).all()


@given(BLOCKS_OF_32)
def test_q4_1_is_within_half_a_step(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows, dtype=torch.float64)
    low, high = weight.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15
    error = (FORMATS.parse("q4_1").pack(weight).unpack() - weight).abs()
    allowed = 0.5 * step + 15 * fp16_error(step) + fp16_error(low)
    assert (error <= allowed + FP32_SLACK * weight.abs().amax(1, keepdim=True)).all()


@given(name=st.sampled_from(sorted(BLOCK_FORMATS)), data=st.data())
def test_unpacking_rows_equals_rows_of_the_unpacked_matrix(name: str, data: st.DataObject) -> None:
    matrix = Blocks(finite_blocks(name, 9, 2), name)
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    ids = torch.tensor(
        data.draw(st.lists(st.integers(-9, 8), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))),
        dtype=torch.int64,
    ).reshape(shape)
    assert torch.equal(matrix.unpack_rows(ids), matrix.unpack()[ids])
    rows = data.draw(st.slices(9).filter(lambda rows: (rows.step or 1) > 0))
    assert torch.equal(matrix.unpack_rows(rows), matrix.unpack()[rows])


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_permuted_rows_are_the_same_rows_still_packed(name: str) -> None:
    matrix = Blocks(finite_blocks(name, 8, 2), name)
    index = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    permuted = matrix.select(index)
    assert torch.equal(permuted.unpack(), matrix.unpack()[index])
    assert (permuted.shape, permuted.format, permuted.nbytes()) == (matrix.shape, name, matrix.nbytes())


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_matmul_in_row_chunks_equals_the_dense_product(
    name: str, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = FORMATS.parse(name).pack(torch.randn(13, 64, generator=generator))
    x = torch.randn(*batch, 64, generator=generator)
    monkeypatch.setattr(weights_format, "_MATMUL_CHUNK", 64 * 5)
    torch.testing.assert_close(matrix.matmul(x), x @ matrix.unpack().T)


def test_matmul_gives_gradients_and_the_type_of_its_input() -> None:
    matrix = FORMATS.parse("q8_0").pack(torch.randn(7, 32, generator=torch.Generator().manual_seed(3)))
    x = torch.ones(2, 32, requires_grad=True)
    matrix.matmul(x).sum().backward()
    torch.testing.assert_close(x.grad, matrix.unpack().sum(0).expand(2, 32))
    assert matrix.matmul(torch.ones(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert Blocks(matrix.blocks[:0], "q8_0").matmul(torch.ones(2, 32)).shape == (2, 0)


def test_a_packed_matrix_works_as_linear_layer_and_embedding() -> None:
    matrix = FORMATS.parse("q4_1").pack(torch.randn(10, 64, generator=torch.Generator().manual_seed(4)))
    ids = torch.tensor([[1, 9, 1], [0, 0, 3]])
    embedded = Embedding(matrix)(ids)
    assert embedded.shape == (2, 3, 64)
    torch.testing.assert_close(Linear(matrix)(embedded), embedded @ matrix.unpack().T)


def test_a_packed_matrix_keeps_only_its_blocks_and_survives_a_state_dict() -> None:
    matrix = FORMATS.parse("q4_0").pack(torch.randn(4, 64, generator=torch.Generator().manual_seed(5)))
    assert list(matrix.parameters()) == []
    assert matrix.nbytes() == matrix.blocks.numel()
    other = FORMATS.parse("q4_0").pack(torch.zeros(4, 64))
    other.load_state_dict(matrix.state_dict())
    assert torch.equal(other.unpack(), matrix.unpack())


@pytest.mark.parametrize(
    ("name", "bits"), [("q8_0", 8.5), ("q4_0", 4.5), ("q4_1", 5.0), ("fp32", 32), ("bf16", 16)]
)
def test_bits_are_what_a_packed_matrix_takes(name: str, bits: float) -> None:
    format = FORMATS.parse(name)
    assert format.bits_per_weight((6, 64)) == bits
    assert 8 * format.pack(torch.ones(6, 64)).nbytes() == bits * 6 * 64


@pytest.mark.parametrize("name", PLAIN)
def test_plain_formats_round_to_their_type(name: str) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(6))
    before = weight.clone()
    packed = FORMATS.parse(name).pack(weight)
    assert isinstance(packed, Dense)
    assert torch.equal(packed.weight, before.to(PLAIN[name]))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("columns", [1, 31, 33])
def test_columns_that_do_not_fill_blocks_are_refused(name: str, columns: int) -> None:
    for refused in (
        lambda: FORMATS.parse(name).pack(torch.zeros(2, columns)),
        lambda: FORMATS.parse(name).bits_per_weight((2, columns)),
    ):
        with pytest.raises(ConfigError, match=rf"{name} must have a multiple of 32 columns. Got {columns}\."):
            refused()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_weights_whose_scale_is_not_finite_are_refused(name: str, value: float) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 40] = value
    with pytest.raises(ConfigError, match="NaN, infinite or larger"):
        FORMATS.parse(name).pack(weight)


def test_plain_formats_refuse_values_they_cannot_hold() -> None:
    with pytest.raises(ConfigError, match=r"fp16 holds finite numbers up to 65504\."):
        FORMATS.parse("fp16").pack(torch.full((1, 1), 1e5))
    assert FORMATS.parse("bf16").pack(torch.full((1, 1), 1e5)).unpack().item() == pytest.approx(
        1e5, rel=2.0**-8
    )


@pytest.mark.parametrize("name", [*QUANTIZED, *PLAIN])
@pytest.mark.parametrize(
    "weight", [torch.zeros(32), torch.zeros(1, 2, 32), torch.zeros(2, 32, dtype=torch.int32)]
)
def test_only_matrices_of_floating_point_numbers_are_packed(name: str, weight: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=f"{name} packs matrices of floating-point numbers"):
        FORMATS.parse(name).pack(weight)


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiple of 18 bytes\. Got 19"):
        Blocks(torch.zeros(2, 19, dtype=torch.uint8), "q4_0")
    with pytest.raises(ConfigError, match="matrix of uint8"):
        Blocks(torch.zeros(18, dtype=torch.uint8), "q4_0")
    with pytest.raises(ConfigError, match="matrix of uint8"):
        Blocks(torch.zeros(1, 18), "q4_0")
    with pytest.raises(ConfigError, match="uint8"):
        dequantize(torch.zeros(1, 18), "q4_0")
    with pytest.raises(UnknownNameError, match="Did you mean 'q4_0'"):
        Blocks(torch.zeros(1, 18, dtype=torch.uint8), "q4_00")
