"""The cycle model of accelerators against the authors' printed counts and by hand."""

from __future__ import annotations

import math

import pytest

from plait.errors import ConfigError
from plait.sim.accelerators import (
    ANT,
    BITMOD,
    FP16,
    MODELS,
    OLIVE,
    PUBLISHED_CYCLES,
    Accelerator,
    Product,
    cost,
    generation,
    prefill,
    products,
)
from plait.weights import GRIDS

MACHINES = {machine.name: machine for machine in (FP16, ANT, OLIVE, BITMOD)}


@pytest.mark.parametrize(
    ("model", "machine"), [(model, machine) for model, row in PUBLISHED_CYCLES.items() for machine in row]
)
def test_generated_tokens_take_the_published_cycles(model: str, machine: str) -> None:
    bits, published = PUBLISHED_CYCLES[model][machine]
    assert generation(MACHINES[machine], MODELS[model], bits).cycles == pytest.approx(published, rel=0.01)


def test_a_product_by_hand() -> None:
    # 4096 x 4096 in 3.0625 bits: 1568 bytes a row of inputs; 8192 bytes of inputs, as many of outputs.
    moved = 8 * (1568 * 4096 + 2 * 8192)
    found = cost(BITMOD, (64, 16), [Product(4096, 4096, 1, 3.0625)])
    assert found.cycles == max(4096 // 4 * 64 * 2, math.ceil(moved / 256))
    assert found.dram_pj == moved * 1200 / 64
    assert found.compute_pj == pytest.approx(0.56 * 1.5 * 64 * 16 * found.cycles)
    assert found.pj == found.compute_pj + found.dram_pj
    # Many rows: the array decides.
    assert cost(FP16, (32, 24), [Product(128, 640, 240, 16)]).cycles == 128 * 20 * 10
    assert cost(FP16, (32, 24), [Product(128, 640, 240, 16, 5)]).cycles == 128 * 20 * 10 * 5


def test_what_fits_no_buffer_is_read_again() -> None:
    # 1 MB of weights, 2 MB of inputs: weights four times, or inputs twice.
    found = cost(FP16, (1 << 20, 1 << 20), [Product(1024, 512, 1024, 16)])
    weights, inputs, outputs = 1 << 20, 2 << 20, 1 << 20
    assert found.dram_pj == 8 * (min(weights * 4 + inputs, inputs * 2 + weights) + outputs) * 1200 / 64


def test_terms_are_half_the_bits_and_cover_every_value() -> None:
    assert [BITMOD.terms(bits) for bits in (3.0625, 4.0625, 6.0625, 8)] == [2, 2, 3, 4]
    assert {FP16.terms(bits) for bits in (3, 16)} == {1}
    for name in ("bitmod3", "bitmod4"):
        assert max(abs(value).bit_count() for value in (*GRIDS[name].values, *GRIDS[name].specials)) == 2


def test_fewer_bits_never_take_longer() -> None:
    for model in MODELS.values():
        for phase in (generation, prefill):
            costs = [phase(BITMOD, model, bits) for bits in (3.0625, 4.0625, 6.0625, 8.0)]
            assert [c.cycles for c in costs] == sorted(c.cycles for c in costs)
            assert [c.dram_pj for c in costs] == sorted(c.dram_pj for c in costs)


def test_models_have_the_weights_that_they_should() -> None:
    for name, billions in [
        ("Llama-2-7B", 6.6),
        ("Llama-2-13B", 12.9),
        ("Llama-3-8B", 7.5),
        ("OPT-1.3B", 1.3),
    ]:
        work = [p for p in products(MODELS[name], 16, 8, 1, 256) if p.batch == 1]
        assert sum(p.inputs * p.outputs for p in work) / 1e9 == pytest.approx(billions, rel=0.02)


def test_products_of_nothing_are_refused() -> None:
    machine = Accelerator("one", 1, (1, 1), (1, 1), False, 16, 1.0, 1.0)
    with pytest.raises(ConfigError, match="positive"):
        cost(machine, (1, 1), [Product(0, 1, 1, 4)])
