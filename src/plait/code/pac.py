"""Prediction sets of programs with a promise, calibrated on examples.

Paper: Khakhar, Mell, Bastani 2023, arXiv:2302.08703. With confidence 1 - delta over the calibration examples, the
true program is in the set for all but a share epsilon of later inputs, whatever the model, as long as those come
from where the examples came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from plait.code.partial import Example, PartialProgram, Prediction, predicted_tree
from plait.code.syntax import language
from plait.decode.prediction_sets import GRID, Bools, calibrated_index, kept_sets
from plait.engine.context_store import fingerprint
from plait.errors import ConfigError, IncompatibleError
from plait.files import write_text
from plait.spec import Spec

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["PACSets", "model_identity", "predict_line", "with_prefix"]

_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class PACSets(Spec):
    """Partial programs that hold the truth for all but a share of inputs.

    Args:
        epsilon: share of inputs whose truth may be missed.
        delta: chance, over calibration examples, that more are missed.
        holes: most holes of a program.
        language: `python` or `sql`.
        variadic: a hole in a list of arguments or statements stands for any number of them.
        tau: the calibrated threshold; None before calibration, 1 where only everything keeps the promise.
        num_examples: how many examples it was calibrated on.
        model: which model and tokenizer the predictions came from; see `model_identity`.
    """

    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.1
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.05
    holes: Annotated[int, Field(ge=1, le=64)] = 4
    language: str = "python"
    variadic: bool = False
    tau: Annotated[float, Field(gt=0, le=1)] | None = None
    num_examples: Annotated[int, Field(ge=0)] = 0
    model: str = ""

    def check(self) -> None:
        language(self.language)

    def calibrate(self, examples: Iterable[Example], *, model: str = "") -> PACSets:
        """The same settings with the threshold that keeps the promise.

        Args:
            examples: predictions with their truths, drawn as later inputs are, none left out.
            model: what `model_identity` says of the model that predicted.

        Raises:
            ConfigError: too few examples, or a truth that does not parse.
        """
        covered = [self.coverage(example) for example in examples]
        index = calibrated_index(covered, self.epsilon, self.delta)
        tau = 1.0 if index is None else GRID[index]
        return replace(self, tau=tau, num_examples=len(covered), model=model)

    def coverage(self, example: Example) -> list[bool]:
        """Whether an example's set holds the truth, at each threshold of the grid.

        Raises:
            ConfigError: the truth does not parse.
        """
        grammar = language(self.language)
        truth = grammar.parse(example.truth)
        if truth is None:
            raise ConfigError(
                f"The true program {example.truth[:60]!r} is not {self.language}. Correct it: leaving such examples "
                "out would void the promise wherever they occur later."
            )
        sets = self.sets(example.prediction)
        found: list[bool] = []
        for index, one in enumerate(sets):
            same = index and one.kept == sets[index - 1].kept
            found.append(found[-1] if same else one.holds(truth.root))
        return found

    def sets(self, prediction: Prediction, taus: Sequence[float] = GRID) -> list[PartialProgram]:
        """The prediction's sets at several thresholds, ascending: each holds the one before."""
        grammar = language(self.language)
        parsed = predicted_tree(prediction, grammar)
        if parsed is None:
            return [PartialProgram(prediction, None, (), (), tau, grammar, self.variadic) for tau in taus]
        tree, syntax = parsed
        base = PartialProgram(prediction, tree, syntax.spans, (), 1.0, grammar, self.variadic)
        below = [tau for tau in taus if tau < 1]
        # At 1 nothing may cost anything, so that everything is removed.
        rows: Bools = np.zeros((len(taus), len(tree)), dtype=bool)
        if below:
            rows[: len(below)] = kept_sets(tree, below, holes=self.holes)
        return [base.at([bool(one) for one in row], tau) for row, tau in zip(rows, taus, strict=True)]

    def predict(self, prediction: Prediction, *, model: str | None = None) -> PartialProgram:
        """The calibrated set of a prediction.

        Args:
            model: what `model_identity` says of the model that predicted, if it is to be checked.

        Raises:
            ConfigError: not calibrated.
            IncompatibleError: calibrated with another model or tokenizer.
        """
        if self.tau is None:
            raise ConfigError("PACSets has no threshold yet. Calibrate it first: plait pac calibrate.")
        if model is not None and model != self.model:
            raise IncompatibleError(
                f"These sets were calibrated with the model {self.model[:12] or '(unnamed)'}, and the predictions are "
                f"of {model[:12]}. The promise holds for that model only; calibrate again."
            )
        # The nested solution at one threshold depends on all larger ones.
        grid = [tau for tau in GRID if tau >= self.tau] if self.tau < 1 else [1.0]
        return self.sets(prediction, grid)[0]

    def save(self, path: Path) -> None:
        """Write settings and threshold to a JSON file."""
        write_text(path, json.dumps({"schema": _SCHEMA, **self.to_json()}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> PACSets:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or is of another kind.
        """
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not a file of calibrated sets: {error}.") from None
        if not isinstance(data, dict) or data.pop("schema", None) != _SCHEMA:
            raise ConfigError(
                f"{path} is not a file of calibrated sets of schema {_SCHEMA}. Calibrate again."
            )
        return cls.from_json(data)


def model_identity(lm: LanguageModel) -> str:
    """A hash of a model's numbers and its tokenizer."""
    digest = hashlib.sha256(fingerprint(lm.model).encode())
    for token in range(lm.tokenizer.vocab_size):
        digest.update(lm.tokenizer.shown_bytes(token, skip_special=False) + b"\0")
    return digest.hexdigest()


def predict_line(lm: LanguageModel, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[Prediction]:
    """Continue each prompt greedily up to the end of the line, with the log-probability of each token.

    The raw law of the model at temperature 1; a token that crosses the end of the line counts whole.
    """
    found = []
    for generation in lm.generate(list(prompts), max_new_tokens=max_new_tokens, stop="\n", logprobs=0):
        pieces: list[bytes] = []
        logprobs: list[float] = []
        for choice in generation.choices:
            piece = lm.tokenizer.token_bytes(choice.token)
            line, newline, _ = piece.partition(b"\n")
            if line:
                assert choice.logprob is not None
                pieces.append(line)
                logprobs.append(min(choice.logprob, 0.0))
            if newline:
                break
        found.append(Prediction(tuple(pieces), tuple(logprobs)))
    return found


def with_prefix(prediction: Prediction, prefix: str) -> Prediction:
    """The prediction behind given text, which is certain: it costs nothing."""
    return Prediction((prefix.encode(), *prediction.pieces), (0.0, *prediction.logprobs))
