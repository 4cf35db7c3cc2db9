"""BitStack: any size of a model from one file, and from one size to another while it runs."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, MeasurementError, Measurements, Quantity, Run

if TYPE_CHECKING:
    from torch import Tensor

    from plait.engine import LanguageModel
    from plait.engine.weight_quality import WeightJudge

__all__ = ["CLAIM"]

_STACK, _UNSCALED = "bitstack", "bitstack:blocks=2,scale=none,sort=error"
_RIVALS = {
    "int2": "uniform:bits=2",
    "gptq2": "gptq:bits=2",
    "int3": "uniform:bits=3",
    "int4": "uniform:bits=4",
}
_MOVED = 8_000_000


# Loads a model within a budget, answers, and prints what its matrices count and what the process holds of its own.
_CHILD = """
import json, sys
from plait.engine import load
lm = load(sys.argv[1], weights="bitstack:budget=" + sys.argv[2], offline=True)
lm.generate("The history", max_new_tokens=2)
own = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
print(json.dumps([lm.weights.nbytes(), 1024 * int(own.split()[1])]))
"""


def _measure(run: Run) -> Measurements:
    from plait.claims.weights import judge_of, packed
    from plait.engine import load

    found: dict[str, Quantity] = {}
    with tempfile.TemporaryDirectory() as folder:
        samples = run.pick(4, 1)
        formats = [_STACK, _UNSCALED, *run.pick(list(_RIVALS.values()), ["uniform:bits=2"])]
        made = yield from packed("smollm2", formats, Path(folder), samples=samples)
        exact = load("smollm2", weights="fp32")
        judge = judge_of(run, exact, windows=3)
        found["file_nats"] = Quantity(judge.quality().nats, "nats")
        lm = load(made[_STACK], weights="file")
        weights = lm.weights

        yield "every size"
        wanted = [1.5 + 4.5 * step / 23 for step in range(24)]
        nats: dict[float, float] = {}
        for bits in wanted[:: run.pick(1, 6)]:
            weights.resize(bits=bits)
            nats[weights.file.bits(weights.position)] = judge.quality(lm.model).nats
            yield f"{weights.file.bits(weights.position):.2f} bits, {nats[max(nats)]:.3f} nats"
        found["sizes"] = Quantity(len(nats), "")
        order = sorted(nats)
        rises = [nats[after] - nats[before] for before, after in pairwise(order)]
        found["largest_rise"] = Quantity(max(rises), "nats", samples=len(rises))
        found |= {f"nats_at_{round(10 * bits):02d}": Quantity(nats[bits], "nats") for bits in order}

        for name, format in _RIVALS.items():
            if format not in made:
                continue
            yield f"against {format}"
            rival = load(made[format], weights="file")
            theirs = judge.quality(rival.model).nats
            size = {"int2": 2.5, "gptq2": 2.5, "int3": 3.5, "int4": 4.5}[name]
            weights.resize(bits=size)
            mine = judge.quality(lm.model).nats
            found[f"{name}_nats"] = Quantity(theirs, "nats")
            found[f"below_{name}"] = Quantity(theirs - mine, "nats")

        yield "what is left after each of 16 blocks"
        found["largest_growth_of_rest"] = _rests(run, exact)
        yield "without scaling, without signs, out of order"
        found |= _ablations(run, lm, load(made[_UNSCALED], weights="file"), judge)
        found |= _moves(lm, run.pick(9, 2))
        yield "what fresh processes hold"
        found["resident_off_count"] = _resident(made[_STACK], weights.sizes())
    return found


def _ablations(
    run: Run, lm: LanguageModel, unscaled: LanguageModel, judge: WeightJudge
) -> dict[str, Quantity]:
    """Two blocks of each matrix: as they are, with all columns alike, and with factors alone in as many bytes."""
    from plait.claims.weights import matrices_of
    from plait.engine import load
    from plait.weights.bitstack import magnitudes

    weights = lm.weights
    level = len(weights.matrices)
    weights.resize(weights.sizes()[level])
    scaled, plain = judge.quality(lm.model).nats, judge.quality(unscaled.model).nats
    factors = load("smollm2", weights="fp32")
    dense, errors = matrices_of(factors), []
    for name, matrix in unscaled.weights.matrices.items():
        rank = max(1, round(matrix.nbytes() / (2 * sum(matrix.shape))))
        left, right = magnitudes(dense[name], rank, seed=run.seed)
        apart, together = matrix.unpack() - dense[name], left @ right.T - dense[name]
        errors.append(float(apart.norm() / together.norm()))
        dense[name].copy_(left @ right.T)
    found = {
        "worse_without_scaling": Quantity(plain - scaled, "nats"),
        "worse_without_signs": Quantity(judge.quality(factors.model).nats - plain, "nats"),
        "error_of_factors_alone": Quantity.median(errors, "x"),
    }
    # Half of the third level, in the order of the stack and in others of as many bytes.
    middle = weights.sizes()[level + level // 2]
    weights.resize(middle)
    in_order, others = judge.quality(lm.model).nats, []
    for seed in range(run.pick(3, 1)):
        weights.resize(weights.sizes()[level])
        names = sorted(weights.matrices)
        random.Random(run.seed + seed).shuffle(names)
        room = middle - weights.nbytes()
        for name in names:
            stack = weights.matrices[name]
            if stack.block_bytes <= room:
                room -= stack.block_bytes
                stack.hold([*stack.blocks, weights.file.read(name, len(stack.blocks))])
        others.append(judge.quality(lm.model).nats)
        for stack in weights.matrices.values():
            stack.hold(stack.blocks[:2])
    found["worse_in_random_order"] = Quantity(statistics.mean(others) - in_order, "nats", samples=len(others))
    return found


def _rests(run: Run, exact: LanguageModel) -> Quantity:
    """How much larger what is left of a matrix ever is than it was a block before; matrices of every sixth layer."""
    from plait.claims.weights import matrices_of
    from plait.weights import BitStack

    format = BitStack(blocks=run.pick(16, 3), scale="none")
    growths = []
    for name, weight in matrices_of(exact).items():
        if int(name.split(".")[1]) % run.pick(6, 30):
            continue
        rest, before = weight.clone(), float(weight.double().norm())
        for part in format.pack(weight).parts():
            rest -= part.values()
            after = float(rest.double().norm())
            growths.append(after / before - 1)
            before = after
    return Quantity.largest(growths, "")


def _moves(lm: LanguageModel, rounds: int) -> dict[str, Quantity]:
    """Down and up again by 8 MB: seconds, bytes read, and whether the same logits come back."""
    weights = lm.weights
    high = (weights.sizes()[0] + weights.sizes()[-1]) // 2
    weights.resize(high)
    law = _law(lm)
    seconds, moved, extra = [], [], []
    for _ in range(rounds):
        for target in (high - _MOVED, high):
            start, counted = time.perf_counter(), _read_bytes()
            change = weights.resize(target)
            seconds.append(time.perf_counter() - start)
            extra.append((_read_bytes() - counted - change.added) / 1e6)
            moved.append((change.added + change.freed) / 1e6)
    return {
        "seconds_for_8_mb": Quantity.median(seconds, "s"),
        "moved": Quantity.median(moved, "MB"),
        "read_beyond_blocks": Quantity.largest(extra, "MB"),
        "difference_after_growth": Quantity(float((_law(lm) - law).abs().max()), ""),
    }


def _law(lm: LanguageModel) -> Tensor:
    """Logits behind a prompt, through the native program where there is one."""
    import torch

    from plait.memory import MemoryPlan, Rows

    ids = torch.tensor(lm.encode("The history of computing machines begins with"))
    with torch.inference_mode():
        past = lm.model.new_past(MemoryPlan.parse("full"))
        return lm.model.answer(ids, Rows([(len(ids), 0)]), [past], wanted=torch.arange(len(ids)))


def _resident(folder: Path, sizes: list[int]) -> Quantity:
    """By how much memory of its own a process grows from the smallest size to the whole, against what is counted."""
    counted, held = [], []
    for size in (sizes[0], sizes[-1]):
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, str(folder), str(size)],
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise MeasurementError(f"A fresh process could not load the stack: {last}")
        nbytes, own = json.loads(child.stdout)
        counted.append(nbytes)
        held.append(own)
    return Quantity(abs((held[1] - held[0]) / (counted[1] - counted[0]) - 1), "of the bytes")


def _read_bytes() -> int:
    """Bytes that this process has read with system calls, where the system counts them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError as error:
        raise MeasurementError(f"This system does not count what a process reads: {error}.") from error
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


CLAIM = Claim(
    name="bitstack",
    title="Any size from one file",
    source="Wang et al. 2024, arXiv:2410.23918",
    headline=(
        "Megabyte-level trade-offs between memory and quality from one compressed model, bridging the gap to "
        "quantisation methods at extreme ratios (the paper: Llama-2, Llama-3 and Llama-3.1, 7B to 70B)."
    ),
    scale=(
        "SmolLM2-135M-Instruct, its file's weights in fp32 as the reference; calibrated on 4 pieces of 512 tokens of "
        "Python's manual, read on 3 windows of 512 tokens of other chapters. 24 sizes from 1.5 to 6 bits a weight, all "
        "overhead counted, native; against rounding to nearest and GPTQ in groups of 64 at equal bits. Ablations at two "
        "blocks of each matrix; 16 blocks of the matrices of every sixth layer, without scaling. Down and up by 8 MB while the model is loaded, page cache warm."
    ),
    bars=(
        Bar(
            quantity="sizes",
            relation=">=",
            value=20,
            unit="",
            why="The card of the method asks for twenty sizes or more.",
        ),
        Bar(
            quantity="largest_rise",
            relation="<=",
            value=0.02,
            unit="nats",
            why="A larger model must never be worse but for the noise of the text.",
        ),
        Bar(
            quantity="below_int2",
            relation=">=",
            value=3.0,
            unit="nats",
            why="At 2.5 bits rounding to nearest says nothing any more, and this must.",
        ),
        Bar(
            quantity="worse_without_scaling",
            relation=">=",
            value=0.0,
            unit="nats",
            why="Weighting columns by their inputs must help, or it is not to be there.",
        ),
        Bar(
            quantity="worse_without_signs",
            relation=">=",
            value=0.0,
            unit="nats",
            why="Taking the signs out must help, or it is not to be there.",
        ),
        Bar(
            quantity="worse_in_random_order",
            relation=">=",
            value=0.0,
            unit="nats",
            why="Sorting must help, or it is not to be there.",
        ),
        Bar(
            quantity="error_of_factors_alone",
            relation="<=",
            value=0.6,
            unit="x",
            why="At equal bytes signs and magnitudes apart must keep much more than a truncated decomposition.",
        ),
        Bar(
            quantity="largest_growth_of_rest",
            relation="<=",
            value=0.0,
            unit="",
            why="What is left of a real matrix must never grow from block to block.",
        ),
        Bar(
            quantity="seconds_for_8_mb",
            relation="<=",
            value=0.05,
            unit="s",
            why="A size must change within the time of a few tokens.",
        ),
        Bar(
            quantity="read_beyond_blocks",
            relation="<=",
            value=0.1,
            unit="MB",
            why="Growing reads the blocks that are added and nothing else.",
        ),
        Bar(
            quantity="resident_off_count",
            relation="<=",
            value=0.01,
            unit="of the bytes",
            why="What a size is said to take is what the process grows by.",
        ),
        Bar(
            quantity="difference_after_growth",
            relation="<=",
            value=0.0,
            unit="",
            why="Grown back, the model must be the same to the last bit.",
        ),
    ),
    measure=_measure,
)
