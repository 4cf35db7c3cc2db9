"""Formats that look at inputs, on a block of SmolLM2 and what it reads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from plait.claims.weights import calibration_text
from plait.engine import load
from plait.memory import Rows
from plait.nn.quantize import _Run
from plait.nn.transformer import Block
from plait.weights import GPTQ, VQ, DecoupleQ, Dense, Linear, LoftQ, Packed, Stacked, Stats, Uniform
from plait.weights.adapters import LoRA, Matrix

_TEXTS, _TOKENS = 6, 128


@dataclass
class RealBlock:
    """A block in fp32, the texts in front of it and behind it, and the inputs (N, I) of its linear layers over all texts.

    The last text is held out.
    """

    block: Block
    streams: list[Tensor]
    targets: list[Tensor]
    inputs: list[Tensor]

    def stats(self, index: int, texts: slice) -> Stats:
        stats = Stats(self.inputs[index].shape[1])
        for x in self.inputs[index].split(_TOKENS)[texts]:
            stats.add(x)
        return stats


def linears_of(block: Block) -> list[Linear]:
    """Query, key and value, then the output, gate and up, and down."""
    feed_forward = block.feed_forward
    return [block.mixer.qkv, block.mixer.output, feed_forward.up, feed_forward.down]  # type: ignore[union-attr]


def put(linear: Linear, parts: list[Packed]) -> None:
    linear.weight = parts[0] if len(parts) == 1 else Stacked(parts)


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> RealBlock:
    lm = load(smollm2_gguf, weights="file")
    ids = torch.tensor(lm.encode(calibration_text(12_000)))[: _TEXTS * _TOKENS]
    rows = Rows([(_TOKENS, 0)] * _TEXTS)
    first, second, block = list(lm.model.blocks)[:3]
    assert isinstance(block, Block)
    linears = linears_of(block)
    inputs: list[Tensor] = [torch.empty(0)] * len(linears)

    def keep(linear: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[linears.index(linear)] = given[0]  # type: ignore[arg-type]

    hooks = [linear.register_forward_pre_hook(keep) for linear in linears]
    with torch.no_grad():
        for linear in linears:
            put(linear, [Dense(piece.unpack().clone()) for piece in linear.weight.pieces()])
        stream = lm.model.enter(lm.model.embed(ids), rows)
        stream = second(first(stream, rows, None), rows, None)
        target = block(stream, rows, None)
    for hook in hooks:
        hook.remove()
    return RealBlock(block, list(stream.split(_TOKENS)), list(target.split(_TOKENS)), inputs)


def output_error(packed: Packed, weight: Tensor, stats: Stats) -> float:
    """Mean squared error of the outputs, as a part of their mean square."""
    change, weight = (packed.unpack() - weight).double(), weight.double()
    return float(((change @ stats.hessian) * change).sum() / ((weight @ stats.hessian) * weight).sum())


@pytest.mark.parametrize(("linear", "piece"), [(0, 1), (1, 0)])
def test_calibrated_vector_codes_keep_the_outputs_of_real_matrices(
    real: RealBlock, linear: int, piece: int
) -> None:
    weight = linears_of(real.block)[linear].weight.pieces()[piece].unpack().detach()[:96]
    plain = VQ().pack(weight)
    found = VQ(start="calibrated", rounds=2).pack(weight, real.stats(linear, slice(-1)))
    assert found.nbytes() == plain.nbytes()
    # On the texts that were read, and on one that was not.
    for texts, bar in ((slice(-1), 0.35), (slice(-1, None), 0.8)):
        stats = real.stats(linear, texts)
        assert output_error(found, weight, stats) < bar * output_error(plain, weight, stats)


@pytest.mark.parametrize("bits", [2, 3])
def test_loftq_starts_nearer_to_real_outputs_than_zero_beside_rounding(
    real: RealBlock, bits: Literal[2, 3]
) -> None:
    weight, x = linears_of(real.block)[0].weight.pieces()[0].unpack().detach(), real.inputs[0]
    wanted = x @ weight.T
    bases = (LoRA(rank=16), Uniform(bits=bits)), (LoRA(rank=16, start="loftq"), LoftQ(bits=bits))
    errors = []
    for method, base in bases:
        packed = base.pack(weight)
        matrix = Matrix("query", *packed.shape, packed.unpack_rows, original=weight.__getitem__)
        change = method.change(matrix, torch.Generator().manual_seed(0), {}).eval()
        with torch.no_grad():
            found = change.apply_to(x, packed.matmul(x), packed.matmul)
        errors.append(float((found - wanted).square().mean() / wanted.square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_the_block_stage_of_decoupleq_brings_a_real_block_nearer_to_its_outputs(real: RealBlock) -> None:
    block = copy.deepcopy(real.block)
    format = DecoupleQ(group=288, epochs=2, rate=2e-4)
    # The codes of its first round.
    start = GPTQ(bits=format.bits, group=format.group)
    with torch.no_grad():
        for index, linear in enumerate(linears_of(block)):
            stats = real.stats(index, slice(-1))
            put(linear, [start.pack(piece.unpack().detach(), stats) for piece in linear.weight.pieces()])
    run = _Run(block, real.streams, real.targets)

    def errors() -> list[float]:
        with torch.no_grad():
            return [float((run.output(index) - run.target(index)).square().mean()) for index in range(_TEXTS)]

    before = errors()
    format.refine(block, _Run(block, real.streams[:4], real.targets[:4]))
    after = errors()
    # The texts that were read, and the others.
    assert sum(after[:4]) < 0.9 * sum(before[:4])
    assert sum(after[4:]) < sum(before[4:])
