"""What the tests of the native operations share: random blocks, instruction sets, bounds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from plait.ops import native
from plait.weights.ggml import BLOCK_FORMATS

FORMATS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
# Byte offsets of the fp16 numbers of a block.
_SCALES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
}  # fmt: skip

# Everything here asserts that the extension is there, unless it was switched off on purpose.
switched_off = pytest.mark.skipif(os.environ.get("PLAIT_NATIVE") == "0", reason="PLAIT_NATIVE is 0")


def extension() -> ModuleType:
    found = native.module()
    assert found is not None, "The extension was not built; set PLAIT_NATIVE=0 to test the reference only."
    return found


def isas() -> list[str]:
    found = native.module()
    return ["scalar"] if found is None else list(found.isas())


@contextmanager
def running(*, isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    """Use another instruction set or number of threads for a while."""
    module = extension()
    old_isa, old_threads = module.isa(), module.threads()
    try:
        if isa is not None:
            module.use_isa(isa)
        if threads is not None:
            module.set_threads(threads)
        yield
    finally:
        module.use_isa(old_isa)
        module.set_threads(old_threads)


def random_blocks(format: str, rows: int, columns: int, extreme: bool = False) -> Tensor:
    """Blocks of every code; with `extreme`, all codes the largest or all the smallest."""
    layout = BLOCK_FORMATS[format]
    count = rows * (columns // layout.elements)
    raw = torch.randint(0, 256, (count, layout.nbytes), dtype=torch.uint8)
    if extreme:
        raw[:] = torch.where(torch.rand(count, 1) < 0.5, 0, 255).to(torch.uint8)
        if format == "q8_0":
            raw[:] = torch.where(torch.rand(count, 1) < 0.5, 128, 127).to(torch.uint8)
    for at in _SCALES[format]:
        raw[:, at : at + 2] = (torch.randn(count, 1) * 0.02).half().view(torch.uint8)
    return raw.view(rows, -1)


def int8_bound(x: Tensor, weight: Tensor) -> Tensor:
    """By how much rounding activations to 8 bits can change each output: (N, I), (O, I) -> (N, O)."""
    half_step = x.view(len(x), x.shape[1] // 32, 32).abs().amax(dim=-1, keepdim=True) / 254
    exact = half_step.expand(-1, -1, 32).reshape(x.shape).double() @ weight.abs().double().T
    # fp32 sums over the blocks, of numbers as large as the products themselves.
    rounding = 4e-6 * (x.abs().double() @ weight.abs().double().T) + 1e-30
    # Codes less a constant are added as they are stored, and minima by themselves: both larger than the weight.
    return exact * 1.001 + rounding * 8
