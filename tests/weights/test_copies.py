"""Copies of packed matrices, as `copy.deepcopy` of a model makes them."""

from __future__ import annotations

import copy

import pytest
import torch
from test_coded import stats_of, weights

from plait.weights import FORMATS, BlockStack
from plait.weights.binary import BinaryMatrix

SPECS = ["q4_0", "q8_0", "uniform:bits=4", "db-llm", "bitstack:blocks=2", "vq:books=1,group=8"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_answers_as_what_it_was_made_of(spec: str) -> None:
    packed = FORMATS.parse(spec).pack(weights(64, 64), stats_of(64))
    x = weights(3, 64)
    if packed.has_native_form:
        packed.to_native()
    wanted = packed.matmul(x)
    assert torch.equal(copy.deepcopy(packed).matmul(x), wanted)


def test_a_copy_of_bits_answers_as_what_it_was_made_of() -> None:
    matrix, x = BinaryMatrix.of(weights(20, 96).sign()), weights(3, 96)
    wanted = matrix.bits().linear(x, None), matrix.matmul(x)
    twin = copy.deepcopy(matrix)
    assert torch.equal(twin.bits().linear(x, None), wanted[0])
    assert torch.equal(twin.matmul(x), wanted[1])


def test_a_copy_of_a_stack_has_a_size_of_its_own() -> None:
    packed = FORMATS.parse("bitstack:blocks=3").pack(weights(64, 64), stats_of(64))
    assert isinstance(packed, BlockStack)
    if packed.has_native_form:
        packed.to_native()
    x = weights(3, 64)
    wanted, twin = packed.matmul(x), copy.deepcopy(packed)
    twin.hold(twin.blocks[:1])
    assert not torch.equal(twin.matmul(x), wanted)
    assert torch.equal(packed.matmul(x), wanted)
