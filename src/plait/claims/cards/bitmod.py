"""BitMoD: for every group of weights the best of four small grids, and the machine that multiplies them bit-serially."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from torch import Tensor

    from plait.sim.accelerators import Accelerator, ModelShape

__all__ = ["CLAIM", "cycle_table"]

_FORMATS = {
    "int4": "uniform:bits=4,group={}",
    # Integers keep a scale and a zero of 16 bits each: 4.5 bits in groups of 64, and in groups of 128 4.25, near BitMoD's.
    "int4_lean": "uniform:bits=4,group=128",
    "int4_symmetric": "uniform:bits=4,group={},symmetric=true",
    "fp4": "bitmod:bits=4,group={},types=none",
    "nf4": "nf4:group={}",
    "bitmod4": "bitmod:bits=4,group={}",
    "int3": "uniform:bits=3,group={}",
    "int3_lean": "uniform:bits=3,group=128",
    "int3_symmetric": "uniform:bits=3,group={},symmetric=true",
    "fp3": "bitmod:bits=3,group={},types=none",
    "bitmod3_er": "bitmod:bits=3,group={},types=er",
    "bitmod3_ea": "bitmod:bits=3,group={},types=ea",
    "bitmod3": "bitmod:bits=3,group={}",
}
# Those that are compared on networks whose weights were never on a grid.
_ON_FP32 = ("int4", "int4_lean", "fp4", "nf4", "bitmod4", "int3", "int3_lean", "fp3", "bitmod3")
_GROUP = 64


def _measure(run: Run) -> Measurements:
    from plait.claims.weights import judge_of, packed
    from plait.engine import load
    from plait.weights import Packed

    found: dict[str, Quantity] = {}
    names = run.pick(list(_FORMATS), ["int4", "bitmod4", "fp3", "int3", "bitmod3"])
    specs = {name: _FORMATS[name].format(_GROUP) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made = yield from packed("smollm2", [specs["bitmod4"]], Path(folder), samples=1)
        found["packing_seconds"] = Quantity(time.perf_counter() - start, "s")
        others = [spec for name, spec in specs.items() if name != "bitmod4"]
        made |= yield from packed("smollm2", others, Path(folder) / "others", samples=1)
        judge = judge_of(run, load("smollm2", weights="fp32"), windows=3)
        exact = judge.quality()
        for name, spec in specs.items():
            yield f"reading with {spec}"
            lm = load(made[spec], weights="file")
            quality = judge.quality(lm.model)
            found[f"{name}_divergence"] = Quantity(quality.divergence, "nats", samples=quality.tokens)
            found[f"{name}_increase"] = Quantity(quality.nats - exact.nats, "nats", samples=quality.tokens)
            if name == "bitmod4":
                matrices = [
                    m for m in lm.model.blocks.modules() if isinstance(m, Packed) and m.pieces() == [m]
                ]
                held, count = (sum(f(m) for m in matrices) for f in (Packed.nbytes, _weights))
                found["bits_per_weight"] = Quantity(8 * held / count, "bits")
    for bits, rivals in ((3, ("int3", "fp3")), (4, ("int4",))):
        best = min(found[f"{rival}_divergence"].value for rival in rivals)
        found[f"of_best_plain_{bits}"] = Quantity(found[f"bitmod{bits}_divergence"].value / best, "x")
    found |= _normal()
    found |= yield from _sentences(run)
    found |= yield from _clean(run)
    yield "cycles of the accelerators"
    return found | cycle_table()


def _clean(run: Run) -> Generator[str, None, dict[str, Quantity]]:
    """Divergences on a model that was trained in full precision here, so that no grid is beneath its weights."""
    from plait.claims.tuning import small_model, windows_of
    from plait.claims.weights import matrices_of, packed
    from plait.engine import load
    from plait.engine.weight_quality import WeightJudge

    found: dict[str, Quantity] = {}
    with tempfile.TemporaryDirectory() as root:
        model, corpus = yield from small_model(run, Path(root) / "clean", blocks=6)
        specs = {
            name: _FORMATS[name].format(_GROUP)
            for name in run.pick(_ON_FP32, ("int4", "int4_lean", "bitmod4"))
        }
        made = yield from packed(str(model), list(specs.values()), Path(root) / "packed", samples=1)
        lm = load(model, weights="fp32")
        matrices = list(matrices_of(lm).values())
        found["clean_error_of_int4"] = Quantity(_error_of_int4(matrices), "x")
        found["clean_kurtosis"] = Quantity(_kurtosis(matrices), "")
        ids = lm.tokenizer.encode("\n\n".join(corpus.held_out))
        judge = WeightJudge(lm.model, windows_of(ids, run.pick(512, 4), 128))
        for name, spec in specs.items():
            yield f"reading with {spec}"
            quality = judge.quality(load(made[spec], weights="file").model)
            found[f"clean_{name}_divergence"] = Quantity(quality.divergence, "nats", samples=quality.tokens)
    mine, best, lean = (found[f"clean_{name}_divergence"].value for name in ("bitmod4", "int4", "int4_lean"))
    return found | {
        "clean_of_best_plain_4": Quantity(mine / best, "x"),
        "clean_of_lean_4": Quantity(mine / lean, "x"),
    }


def _normal() -> dict[str, Quantity]:
    """What becomes of independent normal weights, the law between light tails and heavy ones."""
    import torch

    weight = torch.randn(4096, 384, generator=torch.Generator().manual_seed(0))
    return {"normal_error_of_int4": Quantity(_error_of_int4([weight]), "x", samples=weight.numel())}


def _error_of_int4(matrices: Sequence[Tensor]) -> float:
    """Squared error of 4-bit BitMoD over all weights in that of integers with a zero."""
    from plait.weights import FORMATS

    errors = [
        sum(float((format.pack(matrix).unpack() - matrix).double().square().sum()) for matrix in matrices)
        for format in (FORMATS.parse(_FORMATS[name].format(_GROUP)) for name in ("bitmod4", "int4"))
    ]
    return errors[0] / errors[1]


def _kurtosis(matrices: Sequence[Tensor]) -> float:
    """Mean over groups of the fourth moment in squares of the second: 1.8 for uniform weights, 3 for normal ones."""
    import torch

    groups = torch.cat(
        [matrix[:, : matrix.shape[1] // _GROUP * _GROUP].reshape(-1, _GROUP) for matrix in matrices]
    )
    centred = groups - groups.mean(dim=1, keepdim=True)
    return float((centred.pow(4).mean(dim=1) / centred.square().mean(dim=1).square()).mean())


def _sentences(run: Run) -> Generator[str, None, dict[str, Quantity]]:
    """How far the embeddings of a sentence encoder move, whose published weights are in fp32."""
    from plait.claims.encoders import likeness, sentences
    from plait.weights import FORMATS

    found: dict[str, Quantity] = {}
    judged = sentences(run.pick(400, 3))
    for name in _ON_FP32:
        format = FORMATS.parse(_FORMATS[name].format(_GROUP))
        yield f"sentences with {format}"
        packed = likeness(format, judged)
        found[f"sentences_{name}_distance"] = Quantity(
            1 - packed.mean, "", (1 - max(packed.cosines), 1 - min(packed.cosines)), len(judged)
        )
        found[f"sentences_{name}_bits"] = Quantity(packed.bits_per_weight, "bits")
    for bits in (3, 4):
        mine = found[f"sentences_bitmod{bits}_distance"].value
        best = min(found[f"sentences_{kind}{bits}_distance"].value for kind in ("int", "fp"))
        found[f"sentences_of_best_plain_{bits}"] = Quantity(mine / best, "x")
        lean = found[f"sentences_int{bits}_lean_distance"].value
        found[f"sentences_of_lean_{bits}"] = Quantity(mine / lean, "x")
    return found


def _weights(matrix: object) -> int:
    from plait.weights import Packed

    assert isinstance(matrix, Packed)
    return matrix.shape[0] * matrix.shape[1]


def cycle_table() -> dict[str, Quantity]:
    """Cycles of other machines in those of BitMoD, means over six models, and how far printed counts are."""
    from plait.sim.accelerators import (
        ANT,
        BITMOD,
        FP16,
        MODELS,
        OLIVE,
        PUBLISHED_CYCLES,
        generation,
        prefill,
    )

    machines = {machine.name: machine for machine in (FP16, ANT, OLIVE, BITMOD)}
    offs = [
        abs(generation(machines[machine], MODELS[model], bits).cycles / published - 1)
        for model, row in PUBLISHED_CYCLES.items()
        for machine, (bits, published) in row.items()
    ]
    found = {"off_published_cycles": Quantity.largest(offs, "")}
    # Bits of a weight in each machine where they are not those of all models.
    special = {("ANT", "Yi-6B"): 5.25, ("ANT", "Llama-3-8B"): 4.5, ("OliVe", "Llama-3-8B"): 4.5}
    usual = {"FP16": 16.0, "ANT": 5.0, "OliVe": 4.0}

    def ratio(machine: Accelerator, phase: str) -> float:
        def cycles(one: Accelerator, shape: ModelShape, generated: float, read: float) -> float:
            made, prompt = generation(one, shape, generated).cycles, prefill(one, shape, read).cycles
            return {"generation": made, "prefill": prompt, "both": prompt + 20 * made}[phase]

        logs = []
        for shape in MODELS.values():
            bits = special.get((machine.name, shape.name), usual[machine.name])
            ours = cycles(BITMOD, shape, 3.0625, 4.0625)
            logs.append(math.log(cycles(machine, shape, bits, bits) / ours))
        return math.exp(sum(logs) / len(logs))

    for machine in (FP16, ANT, OLIVE):
        for phase in ("prefill", "generation", "both"):
            name = f"{phase}_over_{machine.name.lower()}"
            found[name] = Quantity(ratio(machine, phase), "x", samples=len(MODELS))
    energies = [
        math.log(generation(FP16, shape, 16).pj / generation(BITMOD, shape, 3.0625).pj)
        for shape in MODELS.values()
    ]
    found["energy_over_fp16"] = Quantity(math.exp(sum(energies) / len(energies)), "x", samples=len(energies))
    return found


CLAIM = Claim(
    name="bitmod",
    title="A number format for every group of weights",
    source="Chen et al. 2025, arXiv:2411.11745",
    headline=(
        "Less than 0.5% of accuracy lost at 4 bits and better perplexity than other quantisers at 3, and an accelerator "
        "1.69 times as fast as ANT and 1.48 times as fast as OliVe (the paper: six models of 1.3B to 13B; simulated)."
    ),
    scale=(
        "SmolLM2-135M-Instruct, its file's weights (on a 4-bit grid of their own, groups of 32) in fp32 as the reference; "
        "all matrices of the blocks in groups of 64, from the weights alone; 3 windows of 512 tokens of Python's manual. "
        "A model of 135M parameters loses far more at 3 bits than one of 7B. And the encoder all-MiniLM-L6-v2, published in fp32: "
        "1 less the cosine of embeddings with those in fp32, 400 sentences of the manual. And a model of 1.3 million parameters "
        "trained here in fp32, on 512 windows of 128 held-out tokens. Its matrices begin "
        "as uniform numbers, and 1,200 steps leave their tails lighter than those of normal ones (`clean_kurtosis`); evenly spaced "
        "levels suit them, and on normal weights the two are even (`normal_error_of_int4`): what BitMoD gains at 4 bits comes "
        "of heavy tails. At equal groups, as the paper compares, integers with a zero take 0.14 to 0.3 bits a weight more; `lean` "
        "is the comparison with integers in groups of 128, at about BitMoD's bits. Cycles and energy are computed from the "
        "paper's model, context 256; buffers' energy is not counted, and of the prefill no counts are printed to compare."
    ),
    bars=(
        Bar(
            quantity="of_best_plain_3",
            relation="<=",
            value=0.85,
            unit="x",
            why="At 3 bits choosing a grid must take away a seventh of the better plain grid's divergence.",
        ),
        Bar(
            quantity="of_best_plain_4",
            relation="<=",
            value=0.9,
            unit="x",
            why="At 4 bits it must take away a tenth of that of integers with a zero.",
        ),
        Bar(
            quantity="sentences_of_best_plain_3",
            relation="<=",
            value=0.85,
            unit="x",
            why="The same at 3 bits on a network that was published in fp32.",
        ),
        Bar(
            quantity="sentences_of_best_plain_4",
            relation="<=",
            value=0.9,
            unit="x",
            why="And at 4 bits.",
        ),
        Bar(
            quantity="clean_of_best_plain_4",
            relation="<=",
            value=0.9,
            unit="x",
            why="The same on weights that no file has rounded to a grid before.",
        ),
        Bar(
            quantity="packing_seconds", relation="<=", value=30.0, unit="s", why="It is as cheap as rounding."
        ),
        Bar(
            quantity="bits_per_weight",
            relation="<=",
            value=4.3,
            unit="bits",
            why="Four bits, with scales, choices and padding.",
        ),
        Bar(
            quantity="off_published_cycles",
            relation="<=",
            value=0.01,
            unit="",
            why="The model of the machine must give the cycles that the authors' simulator prints for generated tokens.",
        ),
    ),
    measure=_measure,
)
