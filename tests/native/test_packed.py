"""Packed low-bit matrices: exact values, a bound on products, one result for a row however it comes."""

from __future__ import annotations

import pytest
import torch
from native_support import FORMATS, extension, int8_bound, isas, random_blocks, running, switched_off

from plait.ops import native
from plait.ops.native import PackedMatrix, Projection, feed_forward
from plait.weights.ggml import BLOCK_FORMATS, dequantize

pytestmark = switched_off


def columns_of(format: str, blocks: int) -> int:
    return BLOCK_FORMATS[format].elements * blocks


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 16, 37])
def test_unpacked_rows_are_the_values_of_the_blocks(format: str, rows: int) -> None:
    blocks = random_blocks(format, rows, columns_of(format, 3))
    matrix = PackedMatrix(blocks, format)
    wanted = dequantize(blocks, format)
    assert torch.equal(matrix.unpack_rows(torch.arange(rows)), wanted)
    picked = torch.tensor([[rows - 1, 0], [0, rows // 2]])
    assert torch.equal(matrix.unpack_rows(picked), wanted[picked])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_product_is_within_the_bound_of_eight_bit_activations(format: str, extreme: bool, isa: str) -> None:
    for rows, blocks, batch in [(1, 1, 1), (37, 2, 7), (192, 3, 33)]:
        raw = random_blocks(format, rows, columns_of(format, blocks), extreme)
        weight = dequantize(raw, format)
        x = torch.randn(batch, weight.shape[1])
        x[0] = 3.0  # every code of the row becomes 127
        x[-1] *= 1e3
        x[-1, 5] = 1e7  # one huge outlier
        with running(isa=isa):
            y = PackedMatrix(raw, format).matmul(x)
        error = (y.double() - x.double() @ weight.double().T).abs()
        assert bool((error <= int8_bound(x, weight)).all())


@pytest.mark.parametrize("format", FORMATS)
def test_every_instruction_set_gives_the_same_bits(format: str) -> None:
    raw = random_blocks(format, 53, columns_of(format, 3))
    x = torch.randn(15, columns_of(format, 3))
    matrix = PackedMatrix(raw, format)
    results = []
    for isa in extension().isas():
        with running(isa=isa):
            results.append(matrix.matmul(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_does_not_depend_on_batch_or_threads() -> None:
    generator = torch.Generator().manual_seed(1)
    for trial in range(60):
        format = FORMATS[trial % len(FORMATS)]
        outputs = int(torch.randint(1, 100, (), generator=generator))
        matrix = PackedMatrix(random_blocks(format, outputs, columns_of(format, 2)), format)
        x = torch.randn(int(torch.randint(1, 40, (), generator=generator)), matrix.shape[1])
        alone = torch.cat([matrix.matmul(row[None]) for row in x])
        cut = int(torch.randint(0, len(x) + 1, (), generator=generator))
        with running(threads=1 + trial % 4):
            assert torch.equal(matrix.matmul(x), alone)
            assert torch.equal(torch.cat([matrix.matmul(x[:cut]), matrix.matmul(x[cut:])]), alone)


@pytest.mark.parametrize("batch", [0, 1, 5, 300])
def test_rows_of_any_layout_and_number(batch: int) -> None:
    raw = random_blocks("q4_1", 20, 64)
    matrix, weight = PackedMatrix(raw, "q4_1"), dequantize(raw, "q4_1")
    x = torch.randn(64, batch).T
    assert not x.is_contiguous() or batch < 2
    y = matrix.matmul(x)
    assert y.shape == (batch, 20)
    assert bool(((y - x @ weight.T).abs() <= int8_bound(x.contiguous(), weight)).all())


def test_zeros_and_tiny_numbers_give_zero_and_nan_stays_in_its_row() -> None:
    matrix = PackedMatrix(random_blocks("q8_0", 5, 64), "q8_0")
    x = torch.randn(4, 64)
    x[0], x[1] = 0.0, 1e-40
    x[2, 3] = float("nan")
    x[3, 3] = float("inf")
    y = matrix.matmul(x)
    assert torch.equal(y[:2], torch.zeros(2, 5))
    assert bool(y[2:].isnan().all())


def test_parts_norm_bias_and_residual_in_one_call() -> None:
    first, second = (random_blocks(f, n, 64) for f, n in (("q4_1", 40), ("q8_0", 24)))
    weight = torch.cat([dequantize(first, "q4_1"), dequantize(second, "q8_0")])
    parts = [PackedMatrix(first, "q4_1"), PackedMatrix(second, "q8_0")]
    bias, norm, x = torch.randn(64), torch.randn(64), torch.randn(9, 64)
    fused = Projection(parts, bias)(x, norm, 1e-5)
    normalised = native.rms_norm(x, norm, 1e-5)
    apart = torch.cat([part.matmul(normalised) for part in parts], dim=-1) + bias
    assert torch.equal(fused, apart)
    assert bool(((fused - bias - normalised @ weight.T).abs() <= int8_bound(normalised, weight) + 1e-5).all())
    residual = torch.randn(9, 64)
    summed = Projection(parts, bias)(x, norm, 1e-5, onto=residual.clone())
    assert torch.equal(summed, residual + fused)
    tail = Projection([(parts[0], 16, 24)])(x)
    assert torch.equal(tail, parts[0].matmul(x)[:, 16:])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu"])
def test_feed_forward_equals_its_parts(activation: str, gated: bool) -> None:
    from plait.ops import activate

    gate, up = (PackedMatrix(random_blocks("q4_0", 96, 64), "q4_0") for _ in range(2))
    down = PackedMatrix(random_blocks("q4_1", 40, 96), "q4_1")
    x = torch.randn(11, 64)
    whole = feed_forward(
        x, Projection([gate]) if gated else None, Projection([up]), Projection([down]), activation
    )
    inner = (
        activate(gate.matmul(x), activation) * up.matmul(x) if gated else activate(up.matmul(x), activation)
    )
    # The activation may differ in its last bit, which may move a code of the inner row by one step.
    step = (
        inner.view(11, -1, 32).abs().amax(dim=-1, keepdim=True).expand(-1, -1, 32).reshape(inner.shape) / 127
    )
    weight = down.unpack_rows(torch.arange(40))
    assert bool(((whole - down.matmul(inner)).abs() <= 0.2 * (step @ weight.abs().T) + 1e-5).all())
    rows = [feed_forward(row[None], Projection([gate]) if gated else None, Projection([up]), Projection([down]), activation) for row in x]  # fmt: skip
    assert torch.equal(whole, torch.cat(rows))


def test_what_does_not_fit_is_refused() -> None:
    module = extension()
    matrix = PackedMatrix(random_blocks("q4_1", 20, 64), "q4_1")
    with pytest.raises(ValueError, match="no native layout"):
        module.PackedMatrix(torch.zeros(1, 20, dtype=torch.uint8), "f32")
    with pytest.raises(ValueError, match="multiple of 20 bytes"):
        module.PackedMatrix(torch.zeros(1, 19, dtype=torch.uint8), "q4_1")
    with pytest.raises(ValueError, match="uint8"):
        module.PackedMatrix(torch.zeros(1, 20), "q4_1")
    with pytest.raises(ValueError, match="shape"):
        module.project(Projection([matrix]).handle, torch.zeros(2, 63), torch.zeros(2, 20))
    with pytest.raises(ValueError, match="float32"):
        module.project(
            Projection([matrix]).handle, torch.zeros(2, 64, dtype=torch.float64), torch.zeros(2, 20)
        )
    with pytest.raises(ValueError, match="contiguous along"):
        module.project(Projection([matrix]).handle, torch.zeros(64, 2).T, torch.zeros(2, 20))
    for row in (-1, 20):
        with pytest.raises(ValueError, match=r"\[0, 20\)"):
            matrix.unpack_rows(torch.tensor([row]))
    for part in [(matrix, 8, 8), (matrix, 0, 21), (matrix, -16, 16)]:
        with pytest.raises(ValueError, match="multiple of 16"):
            Projection([part])
    other = PackedMatrix(random_blocks("q4_1", 20, 96), "q4_1")
    with pytest.raises(ValueError, match="same number of columns"):
        Projection([matrix, other])
