"""Primitives that work on each row alone equal their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from plait.ops import layer_norm, linear, reference, rms_norm

# fp32 sums of a few dozen terms.
TOLERANCE = 1e-5


def test_rms_norm_equals_its_formula() -> None:
    x, weight = torch.randn(5, 3, 33), torch.randn(33)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 0.1).double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_equals_its_formula(has_weight: bool, has_bias: bool) -> None:
    x = torch.randn(5, 33)
    weight = torch.randn(33) if has_weight else None
    bias = torch.randn(33) if has_bias else None
    centred = x.double() - x.double().mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    wanted = wanted * (1 if weight is None else weight) + (0 if bias is None else bias)
    given = layer_norm(x, weight, bias, 0.1)
    torch.testing.assert_close(given.double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_multiplies_in_the_weights_format_and_answers_in_the_rows(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 7, 16), torch.randn(9, 16).to(dtype)
    given = linear(x, weight)
    assert given.dtype == torch.float32
    assert given.shape == (4, 7, 9)
    wanted = x.to(dtype).double() @ weight.double().T
    tolerance = TOLERANCE if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(given.double(), wanted, atol=4 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(96, 1024), (512, 128), (33, 2048), (48, 40)])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 32, 33])
@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize("has_onednn", [False, True])
def test_linear_is_the_product_for_any_number_of_rows(
    shape: tuple[int, int], num_rows: int, exchange: bool, has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_EXCHANGE", exchange)
    if not has_onednn:
        monkeypatch.setattr(reference, "_onednn_linear", None)
    x, weight = torch.randn(num_rows, 2 * shape[1])[:, ::2], torch.randn(shape)
    given = linear(x, weight)
    assert given.shape == (num_rows, shape[0])
    assert given.is_contiguous()
    torch.testing.assert_close(given.double(), x.double() @ weight.double().T, atol=2e-4, rtol=TOLERANCE)


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("exchange", [False, True])
def test_gradients_flow_through_products_of_a_few_rows(
    num_rows: int, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_EXCHANGE", exchange)
    x, weight = torch.randn(1, num_rows, 512, requires_grad=True), torch.randn(128, 512, requires_grad=True)
    wanted = torch.randn(1, num_rows, 128)
    (linear(x, weight) * wanted).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad[0], wanted[0] @ weight.detach(), atol=2e-4, rtol=TOLERANCE)
    torch.testing.assert_close(weight.grad, wanted[0].T @ x.detach()[0], atol=2e-4, rtol=TOLERANCE)
