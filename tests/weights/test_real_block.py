"""Formats that look at inputs, on a block of SmolLM2 and what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plait.claims.weights import calibration_text
from plait.engine import load
from plait.memory import Rows
from plait.nn.transformer import Block
from plait.weights import VQ, Dense, Linear, Packed, Stacked, Stats

_TEXTS, _TOKENS = 6, 128


@dataclass
class RealBlock:
    """A block in fp32, the texts in front of it, and the moments of the inputs of its matrices over all but the last."""

    block: Block
    streams: list[Tensor]
    stats: dict[Linear, Stats]
    held_out: dict[Linear, Stats]

    def outputs(self) -> list[Tensor]:
        return [self.block(stream, Rows([(len(stream), 0)]), None) for stream in self.streams]


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> RealBlock:
    lm = load(smollm2_gguf, weights="file")
    ids = torch.tensor(lm.encode(calibration_text(12_000)))[: _TEXTS * _TOKENS]
    block = lm.model.blocks[2]
    assert isinstance(block, Block)
    linears = [module for module in block.modules() if isinstance(module, Linear)]
    with torch.no_grad():
        for linear in linears:
            parts: list[Packed] = [Dense(piece.unpack().clone()) for piece in linear.weight.pieces()]
            linear.weight = parts[0] if len(parts) == 1 else Stacked(parts)
        streams = []
        for text in ids.split(_TOKENS):
            rows = Rows([(_TOKENS, 0)])
            stream = lm.model.enter(lm.model.embed(text), rows)
            for before in list(lm.model.blocks)[:2]:
                stream = before(stream, rows, None)
            streams.append(stream)
        found: list[dict[Linear, Stats]] = []
        for texts in (streams[:-1], streams[-1:]):
            stats = {linear: Stats(linear.weight.shape[1]) for linear in linears}
            hooks = [
                linear.register_forward_pre_hook(lambda module, given: stats[module].add(given[0]))  # noqa: B023
                for linear in linears
            ]
            for stream in texts:
                block(stream, Rows([(_TOKENS, 0)]), None)
            for hook in hooks:
                hook.remove()
            found.append(stats)
    return RealBlock(block, streams, *found)


def output_error(packed: Packed, weight: Tensor, stats: Stats) -> float:
    """Mean squared error of the outputs, as a part of their mean square."""
    change, weight = (packed.unpack() - weight).double(), weight.double()
    return float(((change @ stats.hessian) * change).sum() / ((weight @ stats.hessian) * weight).sum())


@pytest.mark.parametrize("place", ["key", "output"])
def test_calibrated_vector_codes_keep_the_outputs_of_real_matrices(real: RealBlock, place: str) -> None:
    linear = real.block.mixer.qkv if place == "key" else real.block.mixer.output  # type: ignore[union-attr]
    weight = linear.weight.pieces()[1 if place == "key" else 0].unpack().detach()[:96]
    plain = VQ().pack(weight)
    found = VQ(start="calibrated", rounds=2).pack(weight, real.stats[linear])
    assert found.nbytes() == plain.nbytes()
    # On the text that was read, and on one that was not.
    for stats, bar in ((real.stats, 0.35), (real.held_out, 0.8)):
        errors = [output_error(packed, weight, stats[linear]) for packed in (found, plain)]
        assert errors[0] < bar * errors[1]
