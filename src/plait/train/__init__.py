"""Training: what is learned, the loop, its checkpoints, and the recipes that ship with Plait."""

from __future__ import annotations

from plait.train.config import ModelShape, RunConfig, Training, changed
from plait.train.corpus import Corpus, encoded, python_corpus
from plait.train.data import Batches, Piece, TokenData
from plait.train.loop import Trained, Trainer
from plait.train.objectives import (
    OBJECTIVES,
    DeviationAware,
    Distillation,
    LexicalUnits,
    Loss,
    NextToken,
    Objective,
)
from plait.train.recipes import Recipe, adapter, draft, language_model, lexical_units, packed, reference
from plait.train.runs import (
    RunResult,
    check_folder,
    finish,
    open_start,
    resume,
    train_new,
    tune,
    tune_adapter,
    tune_weights,
)
from plait.train.self_text import own_text, prompts_from, sampled_text
from plait.train.tuners import PV, TUNERS, StraightThrough, Tuner, Values

__all__ = [
    "tune_weights",
    "sampled_text",
    "packed",
    "Values",
    "Tuner",
    "StraightThrough",
    "TUNERS",
    "PV",
    "DeviationAware",
    "OBJECTIVES",
    "Batches",
    "Corpus",
    "Distillation",
    "LexicalUnits",
    "Loss",
    "ModelShape",
    "NextToken",
    "Objective",
    "Piece",
    "Recipe",
    "RunConfig",
    "RunResult",
    "TokenData",
    "Trained",
    "Trainer",
    "Training",
    "adapter",
    "changed",
    "check_folder",
    "draft",
    "encoded",
    "finish",
    "language_model",
    "lexical_units",
    "open_start",
    "own_text",
    "prompts_from",
    "python_corpus",
    "reference",
    "resume",
    "train_new",
    "tune",
    "tune_adapter",
]
