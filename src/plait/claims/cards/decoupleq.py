"""decoupleQ: two-bit codes and levels found in turns, layer by layer and then block by block."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

__all__ = ["CLAIM"]

_FORMATS = {
    "nearest": "uniform:bits=2",
    "gptq": "gptq:bits=2",
    "layers": "decoupleq:bits=2,epochs=0",
    "blocks": "decoupleq:bits=2",
}
# At four bits, where little is left to gain, from a quarter of the text.
_FOUR_BITS = {"gptq4": "gptq:bits=4", "layers4": "decoupleq:bits=4,epochs=0"}


def _of_best_codes(rows: int) -> Quantity:
    """Losses of short rows in those of the best of all codes, each with its best levels; their mean."""
    import torch

    from plait.claims.weights import of_best_codes
    from plait.weights import DecoupleQ, Stats

    columns, format = 6, DecoupleQ(group=0, epochs=0, rounds=10)
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    stats = Stats(columns)
    stats.add(torch.randn(400, columns, generator=generator) @ mixing)
    ratios = of_best_codes(format, torch.randn(rows, columns, generator=generator), stats)
    return Quantity(sum(ratios) / rows, "x", (min(ratios), max(ratios)), rows)


def _of_embeddings(name: str, judged: Sequence[str], calibration: Sequence[str]) -> dict[str, Quantity]:
    """Cosines of the embeddings of a sentence encoder, whose published weights are in fp32, with those it had."""
    from plait.claims.encoders import likeness
    from plait.weights import FORMATS

    packed = likeness(FORMATS.parse(_FORMATS[name]), judged, calibration)
    spread = (min(packed.cosines), max(packed.cosines))
    return {
        f"sentences_{name}_cosine": Quantity(packed.mean, "", spread, len(judged)),
        "sentences_bits": Quantity(packed.bits_per_weight, "bits"),
    }


def _packed_anew(name: str, format: str, folder: Path, samples: int) -> dict[str, Quantity]:
    """Pack SmolLM2 into a folder, whatever a stopped run has left there; the time that it takes."""
    from plait.claims.weights import calibration_text
    from plait.engine import quantize

    text = calibration_text()
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    quantize("smollm2", format, folder, calibration=text, samples=samples)
    return {f"{name}_seconds": Quantity(time.perf_counter() - start, "s")}


def _measure(run: Run) -> Measurements:
    from plait.claims.encoders import sentences
    from plait.claims.texts import token_runs
    from plait.claims.weights import judge_of, output_errors_of
    from plait.engine import load

    yield "short rows, and all codes that they could have"
    found = {"of_best_codes": _of_best_codes(run.pick(200, 5))}
    judged = sentences(run.pick(400, 3))
    calibration = sentences(run.pick(400, 5), calibration=True)
    for name, format in _FORMATS.items():
        yield f"sentences with {format}"
        found |= run.once(f"sentences-{name}", _of_embeddings, name, judged, calibration)
    gain = found["sentences_blocks_cosine"].value - found["sentences_nearest_cosine"].value
    found["sentences_above_nearest"] = Quantity(gain, "")
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Path] = {}
        for name, format in (_FORMATS | _FOUR_BITS).items():
            yield f"packing in {format}"
            samples = run.pick(4 if name in _FOUR_BITS else 16, 1)
            made[name] = (run.parts or Path(folder)) / f"packed-{name}"
            found |= run.once(f"packing-{name}", _packed_anew, name, format, made[name], samples)
        yield "what changes in the outputs of matrices"
        exact = load("smollm2", weights="fp32")
        layer_wise = {name: made[name] for name in ("nearest", "gptq", "layers")}
        texts = token_runs(exact.tokenizer, run.pick([512] * 4, [64]))
        errors = output_errors_of(exact, layer_wise, texts)
        found["error_of_gptq"] = Quantity(errors["layers"] / errors["gptq"], "x")
        found["error_of_nearest"] = Quantity(errors["layers"] / errors["nearest"], "x")
        judge = judge_of(run, exact, windows=3)
        found["file_nats"] = Quantity(judge.quality().nats, "nats")
        for name, format in (_FORMATS | _FOUR_BITS).items():
            yield f"reading with {format}"
            quality = judge.quality(load(made[name], weights="file").model)
            found[f"{name}_nats"] = Quantity(quality.nats, "nats", samples=quality.tokens)
            found[f"{name}_divergence"] = Quantity(quality.divergence, "nats", samples=quality.tokens)
    for before, after in (
        ("nearest", "gptq"), ("gptq", "layers"), ("layers", "blocks"), ("gptq4", "layers4"),
    ):  # fmt: skip
        gain = found[f"{before}_nats"].value - found[f"{after}_nats"].value
        found[f"{after}_below_{before}"] = Quantity(gain, "nats")
    return found


CLAIM = Claim(
    name="decoupleq",
    title="Two-bit codes and levels found in turns",
    source="Guo et al. 2024, arXiv:2404.12759",
    headline=(
        "Uniform 2-bit weights near the accuracy of fp16 (the paper: large speech models in production, Llama, in groups "
        "of 64 or whole rows)."
    ),
    scale=(
        "SmolLM2-135M-Instruct, its file's weights in fp32 as the reference; 2 bits in groups of 64, 2.5 bits a weight, "
        "calibrated on 16 pieces of 512 tokens of Python's manual, read on 3 windows of 512 tokens of other chapters. "
        "Rounding to nearest, GPTQ, decoupleQ layer by layer, and with its second stage; GPTQ and decoupleQ layer by layer "
        "at 4 bits too, calibrated on 4 pieces. Errors of outputs are summed over all matrices of the blocks, for the "
        "inputs that the model has on 4 pieces of the text it is read on. 200 random rows of 6 weights against all 4,096 codes. No speech model is run; in its place a sentence encoder whose "
        "published weights are in fp32, all-MiniLM-L6-v2 (10.6 million weights in the matrices of its layers), calibrated on "
        "400 sentences of Python's manual and judged on 400 of other chapters, by the cosine of embeddings with those in fp32."
    ),
    bars=(
        Bar(
            quantity="gptq_below_nearest",
            relation=">=",
            value=0.0,
            unit="nats",
            why="Making up for errors must beat rounding.",
        ),
        Bar(
            quantity="layers_below_gptq",
            relation=">=",
            value=4.0,
            unit="nats",
            why="Finding codes and levels together must beat codes on given levels by far.",
        ),
        Bar(
            quantity="blocks_below_layers",
            relation=">=",
            value=1.0,
            unit="nats",
            why="Tuning the levels of whole blocks must pay for its time.",
        ),
        Bar(
            quantity="error_of_gptq",
            relation="<=",
            value=0.4,
            unit="x",
            why="Of what GPTQ changes in the outputs of matrices, less than half must be left.",
        ),
        Bar(
            quantity="error_of_nearest",
            relation="<=",
            value=0.1,
            unit="x",
            why="Of what rounding changes in them, a tenth.",
        ),
        Bar(
            quantity="of_best_codes",
            relation="<=",
            value=1.25,
            unit="x",
            why="Where all codes can be tried, it must come near the best of them in the mean.",
        ),
        Bar(
            quantity="layers4_below_gptq4",
            relation=">=",
            value=0.0,
            unit="nats",
            why="Where four bits leave little to gain, it must not be worse either.",
        ),
        Bar(
            quantity="sentences_blocks_cosine",
            relation=">=",
            value=0.95,
            unit="",
            why="Embeddings of a network that was published in fp32 must point where they did.",
        ),
        Bar(
            quantity="sentences_above_nearest",
            relation=">=",
            value=0.0,
            unit="",
            why="And rounding must not do as well.",
        ),
        Bar(
            quantity="layers_seconds",
            relation="<=",
            value=600.0,
            unit="s",
            why="The whole model must take minutes.",
        ),
    ),
    measure=_measure,
)
