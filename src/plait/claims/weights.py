"""Models packed anew in a folder of their own, and judged against the weights they were made of; for claims."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.claims.claim import Run
    from plait.engine import LanguageModel
    from plait.engine.weight_quality import WeightJudge

__all__ = ["calibration_text", "judge_of", "packed"]

_WINDOW = 512


def calibration_text(length: int = 400_000) -> str:
    """Chapters of Python's manual that `judge_of` does not read."""
    from plait.claims.texts import other_manual

    return "\n\n".join(other_manual())[:length]


def judge_of(run: Run, lm: LanguageModel, windows: int) -> WeightJudge:
    """A judge over windows of Python's manual, 512 tokens each, 96 in a quick run."""
    from plait.claims.texts import token_runs
    from plait.engine.weight_quality import WeightJudge

    tokens = run.pick(_WINDOW, 96)
    return WeightJudge(lm.model, token_runs(lm.tokenizer, [tokens] * run.pick(windows, 1)))


def packed(
    model: str, formats: Sequence[str], folder: Path, *, samples: int
) -> Generator[str, None, dict[str, Path]]:
    """Pack a model in every format, each into a folder of its own; a line before each."""
    from plait.engine import quantize

    text, made = calibration_text(), {}
    for number, format in enumerate(formats):
        yield f"packing in {format}"
        made[format] = folder / str(number)
        quantize(model, format, made[format], calibration=text, samples=samples)
    return made
