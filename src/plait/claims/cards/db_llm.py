"""DB-LLM: two binary planes with free scales, tuned on the model's own text with more weight where it is unsure."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from plait.nn import Transformer

__all__ = ["CLAIM"]

_GAMMAS = (0.1, 0.5, 1.0)
_PLANES, _EVEN = "straight-through:latent=model,rate=0", "values"


def _measure(run: Run) -> Measurements:
    from plait.claims.tuning import small_model, tuned, unsure_nats, windows_of
    from plait.claims.weights import judge_of, packed
    from plait.engine import load
    from plait.engine.weight_quality import WeightJudge
    from plait.train import sampled_text

    found: dict[str, Quantity] = {}
    with tempfile.TemporaryDirectory() as root:
        # The small model: planes against an even grid at equal steps, and the loss against plain distillation.
        model, corpus = yield from small_model(run, Path(root) / "small")
        formats = {"planes": "db-llm:start=search", "even": "uniform:bits=2"}
        made = yield from packed(str(model), list(formats.values()), Path(root) / "packed", samples=1)
        lm = load(model, weights="fp32")
        ids = lm.tokenizer.encode("\n\n".join(corpus.held_out))
        windows = windows_of(ids, run.pick(32, 4), 128)
        judge = WeightJudge(lm.model, windows)
        texts = sampled_text(lm, run.pick(256, 8), 128, seed=run.seed)
        steps, rows = run.pick(120, 4), run.pick(1024, 256)
        unsure: dict[str, float] = {}
        runs = [("planes", 0.0, _PLANES), ("even", 0.5, _EVEN), *(("planes", g, _PLANES) for g in _GAMMAS)]
        for number, (kind, gamma, method) in enumerate(runs):
            yield f"{steps} steps of {rows} tokens: {formats[kind]}, gamma {gamma}"
            done = tuned(
                model, made[formats[kind]], Path(root) / f"tuned{number}", method, texts,
                objective=f"dad:gamma={gamma}", steps=steps, rows=rows, seed=run.seed,
            )  # fmt: skip
            mine = load(done.folder, weights="file").model
            quality = judge.quality(mine)
            nats, count = unsure_nats(lm.model, mine, windows)
            label = f"{kind}_{round(10 * gamma):02d}"
            found[f"{label}_nats"] = Quantity(quality.nats, "nats", samples=quality.tokens)
            found[f"{label}_unsure_nats"] = Quantity(nats, "nats", samples=count)
            unsure[label] = nats
        best = min((f"planes_{round(10 * g):02d}" for g in _GAMMAS), key=lambda label: unsure[label])
        found["below_plain_where_unsure"] = Quantity(unsure["planes_00"] - unsure[best], "nats")
        found["below_even_grid"] = Quantity(
            found["even_05_nats"].value - found["planes_05_nats"].value, "nats"
        )

        # A real model, tuned on what it writes itself; a quick run calibrates the small one.
        formats = {"search": "db-llm:start=search", "calibrated": "db-llm:start=calibrated"}
        sources = {"search": "smollm2", "calibrated": run.pick("smollm2", str(model))}
        # A start that says something already is lost in steps as long as a start that says nothing needs.
        rates = {"search": 5e-3, "calibrated": 1e-3}
        sizes = {"smollm2": run.pick((128, 256), (2, 48)), str(model): (8, 128)}
        for name, source in sources.items():
            made = yield from packed(
                source, [formats[name]], Path(root) / f"real-{name}", samples=run.pick(16, 1)
            )
            yield f"{source} writes"
            texts = sampled_text(load(source), *sizes[source], seed=run.seed)
            real = judge_of(run, load(source, weights="fp32"), windows=2)
            before = load(made[formats[name]], weights="file").model
            start = real.quality(before)
            steps, rows = run.pick(100, 1), run.pick(512, 32)
            yield f"{steps} steps of {rows} tokens: {formats[name]}, {start.nats:.2f} nats as it starts"
            # Calibrated planes are kept: the nearest of the model's own weights would be others.
            done = tuned(
                source, made[formats[name]], Path(root) / name, _PLANES if name == "search" else _EVEN, texts,
                objective="dad", steps=steps, rows=rows, learning_rate=rates[name], seed=run.seed,
            )  # fmt: skip
            quality = real.quality(load(done.folder, weights="file").model)
            found[f"{name}_start_nats"] = Quantity(start.nats, "nats", samples=start.tokens)
            found[f"{name}_nats"] = Quantity(quality.nats, "nats", samples=quality.tokens)
            found[f"{name}_gain"] = Quantity(start.nats - quality.nats, "nats")
            found[f"{name}_additions"] = Quantity(_additions(before), "")
        found["fewer_additions"] = Quantity(1 - found["search_additions"].value / 2, "")
    return found


def _additions(model: Transformer) -> float:
    """Ones of both planes for each weight of a model's blocks, counted."""
    from plait.weights import Coded

    ones = weights = 0
    for matrix in model.blocks.modules():
        if isinstance(matrix, Coded):
            codes = matrix.code_rows()
            ones += int((codes >> 1).sum()) + int((codes & 1).sum())
            weights += codes.numel()
    return ones / max(1, weights)


CLAIM = Claim(
    name="db-llm",
    title="Two binary planes with scales of their own",
    source="Chen et al. 2024, arXiv:2402.11960",
    headline=(
        "2-bit weights as two sparse binary planes, tuned without data: perplexity 9.64 of the best method before becomes 7.23 "
        "with 20% fewer operations (the paper: Llama 2 7B, WikiText2, groups of 64)."
    ),
    scale=(
        "SmolLM2-135M-Instruct, its file's weights in fp32 as the teacher, groups of 64, 2.5 bits a weight; 100 steps of 512 "
        "tokens that it wrote itself, read on 2 windows of 512 tokens of Python's manual. Planes against an even grid and "
        "the loss against plain distillation: a model of 0.9 million parameters trained here, 120 steps of 1,024 tokens. "
        "Operations are additions of the stored planes; their time is not claimed."
    ),
    bars=(
        Bar(
            quantity="search_gain",
            relation=">=",
            value=3.0,
            unit="nats",
            why="As they start the planes say nothing; tuning must bring them back.",
        ),
        Bar(
            quantity="calibrated_gain",
            relation=">=",
            value=0.3,
            unit="nats",
            why="Tuning must improve a calibrated start too.",
        ),
        Bar(
            quantity="below_even_grid",
            relation=">=",
            value=0.0,
            unit="nats",
            why="Free scales must beat an even grid of as many bytes at equal steps.",
        ),
        Bar(
            quantity="below_plain_where_unsure",
            relation=">=",
            value=0.0,
            unit="nats",
            why="More weight where the teacher is unsure must help there.",
        ),
        Bar(
            quantity="search_additions",
            relation="<=",
            value=0.84,
            unit="",
            why="Planes must be sparse: at most 42% ones.",
        ),
        Bar(
            quantity="fewer_additions",
            relation=">=",
            value=0.2,
            unit="",
            why="A fifth of the additions of dense planes must be saved.",
        ),
    ),
    measure=_measure,
)
