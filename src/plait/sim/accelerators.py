"""Cycles and energy of accelerators that multiply a language model's weights, by BitMoD's model.

Chen et al. 2025, "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration", HPCA, arXiv:2411.11745, section 5: an
array of processing elements multiplies matrices that are read from DRAM; whichever takes longer decides. Written
from the formulas: nothing is executed, and what a cycle is worth on real silicon is the paper's number, not ours.

Shapes: a product has `inputs` columns and `outputs` rows of weights, and `tokens` rows of activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plait.errors import ConfigError

__all__ = [
    "ANT",
    "BITMOD",
    "FP16",
    "MODELS",
    "OLIVE",
    "PUBLISHED_CYCLES",
    "Accelerator",
    "Cost",
    "ModelShape",
    "Product",
    "generation",
    "prefill",
]

_BUS_BITS = 256  # of DRAM a cycle: 32 GB/s at 1 GHz
_BUFFER_BYTES = 512 << 10  # of weights, and again of inputs
_ACTIVATION_BITS = 16
_DRAM_PJ_PER_BIT = 1200 / 64
# Place and route, on top of what synthesis says.
_ROUTED = 1.5


@dataclass(frozen=True)
class ModelShape:
    """A decoder as matrices.

    Args:
        name: as in the paper.
        layers, width, inner: blocks, width, and width of the feed-forward.
        heads, kv_heads: of attention; a head has `width / heads` channels.
        vocab: rows of the output head.
        gated: whether the feed-forward has a gate.
    """

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    gated: bool = True


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("OPT-1.3B", 24, 2048, 8192, 32, 32, 50272, gated=False),
        ModelShape("Phi-2", 32, 2560, 10240, 32, 32, 51200, gated=False),
        ModelShape("Yi-6B", 32, 4096, 11008, 32, 4, 64000),
        ModelShape("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000),
        ModelShape("Llama-2-13B", 40, 5120, 13824, 40, 40, 32000),
        ModelShape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128256),
    )
}


@dataclass(frozen=True)
class Accelerator:
    """An array of processing elements, and how many bits a weight has in it.

    Args:
        name: of the machine.
        lanes: products that an element makes at once, of one term each.
        generation, prefill: rows and columns of the array, for one token and for many.
        is_serial: whether a weight takes one cycle for each of its terms; a term covers two bits.
        cache_bits: of keys and values.
        pj, area: of an element: energy of a cycle and um^2, before place and route.
    """

    name: str
    lanes: int
    generation: tuple[int, int]
    prefill: tuple[int, int]
    is_serial: bool
    cache_bits: float
    pj: float
    area: float

    def terms(self, bits: float) -> int:
        """Cycles that a weight of so many bits takes."""
        return math.ceil(math.floor(bits) / 2) if self.is_serial else 1


FP16 = Accelerator("FP16", 1, (64, 12), (32, 24), False, 16, 0.77, 1968.7)
ANT = Accelerator("ANT", 1, (64, 16), (32, 32), False, 16, 0.56, 1318.6)
OLIVE = Accelerator("OliVe", 1, (72, 16), (36, 32), False, 16, 0.613, 1318.6)
BITMOD = Accelerator("BitMoD", 4, (64, 16), (32, 32), True, 8, 0.56, 1507.7)

# Cycles of a generated token that the authors' simulator prints, by model and machine, and bits of a weight there.
# ANT's bits for Llama-3-8B are those that its printed count implies.
PUBLISHED_CYCLES: dict[str, dict[str, tuple[float, int]]] = {
    "Llama-2-7B": {"BitMoD": (3.0625, 79_493_200), "FP16": (16, 413_518_608), "ANT": (5, 129_497_936)},
    "Llama-2-13B": {"BitMoD": (3.0625, 154_552_560), "FP16": (16, 804_330_080), "ANT": (5, 251_907_680)},
    "Llama-3-8B": {"BitMoD": (3.0625, 90_099_088), "FP16": (16, 469_624_976), "ANT": (4.5, 132_370_576)},
}


class Product(NamedTuple):
    """A matrix times rows; `batch` of them for attention, whose matrices are keys or values of a head."""

    inputs: int
    outputs: int
    tokens: int
    bits: float
    batch: int = 1


class Cost(NamedTuple):
    """Cycles, and energy in pJ: of the array, and of what is read from and written to DRAM."""

    cycles: int
    compute_pj: float
    dram_pj: float

    @property
    def pj(self) -> float:
        """All energy but that of the buffers, whose cost depends on the process and is not part of this."""
        return self.compute_pj + self.dram_pj


def products(model: ModelShape, bits: float, cache_bits: float, tokens: int, context: int) -> list[Product]:
    """Everything that is multiplied for `tokens` rows that see `context` positions.

    Attention's products count their steps for every query head and their traffic for one, which is what the counts of
    the authors' simulator imply.
    """
    width, head = model.width, model.width // model.heads
    kv = head * model.kv_heads
    layer = [
        Product(width, width, tokens, bits),
        *[Product(width, kv, tokens, bits)] * 2,
        Product(head, context, tokens, cache_bits, model.heads),
        Product(context, head, tokens, cache_bits, model.heads),
        Product(width, width, tokens, bits),
        *[Product(width, model.inner, tokens, bits)] * (2 if model.gated else 1),
        Product(model.inner, width, tokens, bits),
    ]
    return [*layer * model.layers, Product(width, model.vocab, tokens, bits)]


def cost(machine: Accelerator, array: tuple[int, int], work: Sequence[Product]) -> Cost:
    """Cycles and energy of products, one after the other.

    Raises:
        ConfigError: a size below 1.
    """
    rows, columns = array
    cycles, dram_bits = 0, 0
    for product in work:
        if min(product[:5]) <= 0:
            raise ConfigError(f"Sizes and bits of a product must be positive. Got {product}.")
        steps = math.ceil(product.inputs / machine.lanes) * math.ceil(product.outputs / rows)
        steps *= math.ceil(product.tokens / columns) * product.batch * machine.terms(product.bits)
        bits = 8 * _dram_bytes(product)
        cycles += max(steps, math.ceil(bits / _BUS_BITS))
        dram_bits += bits
    return Cost(cycles, machine.pj * _ROUTED * rows * columns * cycles, dram_bits * _DRAM_PJ_PER_BIT)


def _dram_bytes(product: Product) -> int:
    """What a product moves; where neither side fits its buffer, the cheaper one is read again and again."""
    weights = math.ceil(product.inputs * product.bits / 8) * product.outputs
    inputs = math.ceil(product.inputs * _ACTIVATION_BITS / 8) * product.tokens
    outputs = math.ceil(product.outputs * _ACTIVATION_BITS / 8) * product.tokens
    if weights > _BUFFER_BYTES and inputs > _BUFFER_BYTES:
        again = math.ceil(inputs / _BUFFER_BYTES), math.ceil(weights / _BUFFER_BYTES)
        return min(weights * again[0] + inputs, inputs * again[1] + weights) + outputs
    return weights + inputs + outputs


def generation(machine: Accelerator, model: ModelShape, bits: float, *, context: int = 256) -> Cost:
    """One token behind `context` others."""
    return cost(machine, machine.generation, products(model, bits, machine.cache_bits, 1, context))


def prefill(machine: Accelerator, model: ModelShape, bits: float, *, context: int = 256) -> Cost:
    """A prompt of `context` tokens at once."""
    return cost(machine, machine.prefill, products(model, bits, machine.cache_bits, context, context))
