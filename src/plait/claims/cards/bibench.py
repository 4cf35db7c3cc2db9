"""BiBench: eight ways to train networks of one bit, by six tracks, and the product that they run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.claims.bibench.expected import EXPECTED
from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from plait.claims.bibench.cells import Grid

__all__ = ["CLAIM"]

_SIZES = (512, 1024, 2048)
_SEEDS = (0, 1, 2)


def _measure(run: Run) -> Measurements:
    import dataclasses

    from plait.claims.bibench.cells import FULL_PRECISION, QUICK, TINY, Grid
    from plait.claims.bibench.report import measure

    # The benchmark's full scale takes a night: plait bench bibench --full.
    seeds = tuple(run.seed + seed for seed in run.pick(_SEEDS, _SEEDS[:1]))
    scale = dataclasses.replace(run.pick(QUICK, TINY), seeds=seeds)
    grid = Grid(scale, run.pick((), ("bnn", "xnor", "fda")), run.parts)
    report = yield from measure(grid)
    found = {one.name: Quantity(one.found, EXPECTED[one.name].unit) for one in report.findings}
    for track, scores in report.scores.items():
        for method, score in scores.items():
            if method != FULL_PRECISION:
                found[f"{track}_{method}"] = Quantity(score.overall, "x", samples=len(score.parts))
    yield "products of bits and of numbers"
    for size in run.pick(_SIZES, (1024,)):
        for batch in (1, 32):
            found[f"product_{size}_batch_{batch}"] = _product(size, batch, run.pick(101, 3))
    found["size_off_formula"], found["change_by_packing"] = _packed(grid)
    return found


def _product(size: int, batch: int, rounds: int) -> Quantity:
    """How many times faster signs are taken and multiplied than fp32 is, in turns on one thread."""
    import torch

    from plait.claims.bibench.tracks import in_turns
    from plait.weights.binary import BNN, binarize, export

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False))
    binary = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False))
    binarize(binary, BNN(), skip=[])
    seconds = in_turns({"fp32": plain, "bits": export(binary)}, torch.randn(batch, size), rounds)
    return Quantity(seconds["fp32"] / seconds["bits"], "x", samples=rounds)


def _packed(grid: Grid) -> tuple[Quantity, Quantity]:
    """By how much stored bytes miss the formula, and answers of packed networks those of trained ones; the largest."""
    import torch

    from plait.claims.bibench.networks import NETWORKS
    from plait.claims.bibench.tracks import counted, sample_of, served, stored_bytes
    from plait.weights.binary import export

    off, changed = [], []
    for network in NETWORKS:
        for method in grid.methods:
            model, x = served(grid, network, method).eval(), sample_of(grid, network, 32)
            packed = export(model)
            off.append(abs(8 * stored_bytes(packed) / counted(model, x[:1])[0] - 1))
            with torch.no_grad():
                answers = model(x)
                changed.append(float((packed(x) - answers).abs().max() / answers.abs().max()))
    return Quantity.largest(off, "of the formula"), Quantity.largest(changed, "of the largest answer")


CLAIM = Claim(
    name="bibench",
    title="Eight ways to train one bit, by six tracks",
    source="Qin et al. 2023, arXiv:2301.11233",
    headline=(
        "The operator decides accuracy and deployability, accuracy varies strongly with task and architecture, and "
        "speed-ups are real where there is a library (the paper: nine data sets, ResNets, BERT and PointNet, ARM boards)."
    ),
    scale=(
        "Seven networks of 6,000 to 35,000 weights on four tasks: scikit-learn's digits as images and as points, lines of Python's standard library "
        "and manual by kind, the next kind of token in its programs. 24 epochs of 1,200 samples, 3 seeds, Adam at 0.001 with a "
        "cosine, full precision with the same recipe; 500 samples held out; four settings on digits for what training takes. "
        "Nine corruptions in five strengths. Latency and bytes of packed networks of 80,000 to 440,000 weights on one thread of this "
        "machine, and of square products against torch. Object detection and speech are not covered."
    ),
    bars=(
        *(
            Bar(quantity=name, relation=">=", value=one.least, unit=one.unit, why=one.says)
            for name, one in EXPECTED.items()
        ),
        Bar(
            quantity="product_1024_batch_1",
            relation=">=",
            value=6.0,
            unit="x",
            why="Bits are a thirty-second of what fp32 reads, and must be faster than that is read.",
        ),
        Bar(
            quantity="product_1024_batch_32",
            relation=">=",
            value=3.0,
            unit="x",
            why="Where fp32 reads its weights once for many rows, counting bits must still pay.",
        ),
        Bar(
            quantity="size_off_formula",
            relation="<=",
            value=0.02,
            unit="of the formula",
            why="What is stored must be what is counted.",
        ),
        Bar(
            quantity="change_by_packing",
            relation="<=",
            value=0.0,
            unit="of the largest answer",
            why="What is summed are whole numbers in training too, so a packed network answers bit for bit the same.",
        ),
    ),
    measure=_measure,
    needs=("sklearn",),
)
