"""Training: what is learned, the loop, its checkpoints, and the recipes that ship with Plait."""

from __future__ import annotations

from plait.train.config import ModelShape, RunConfig, Training, changed
from plait.train.corpus import Corpus, encoded, python_corpus
from plait.train.data import Batches, Piece, TokenData
from plait.train.loop import Trained, Trainer
from plait.train.objectives import OBJECTIVES, Distillation, LexicalUnits, Loss, NextToken, Objective
from plait.train.recipes import Recipe, adapter, draft, language_model, lexical_units, reference
from plait.train.runs import RunResult, finish, open_start, resume, train_new, tune, tune_adapter
from plait.train.self_text import own_text, prompts_from

__all__ = [
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
