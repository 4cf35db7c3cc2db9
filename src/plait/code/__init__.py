"""Code: partial programs with a promise."""

from __future__ import annotations

from plait.code.pac import PACSets, model_identity, predict_line, with_prefix
from plait.code.partial import Example, PartialProgram, Prediction
from plait.code.syntax import language

__all__ = [
    "Example",
    "PACSets",
    "PartialProgram",
    "Prediction",
    "language",
    "model_identity",
    "predict_line",
    "with_prefix",
]
