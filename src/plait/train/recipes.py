"""Runs that ship with Plait, each a function that returns its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from plait.spec import Spec
from plait.train.config import FULL, ModelShape, Training
from plait.train.objectives import DeviationAware, Distillation, LexicalUnits, NextToken, Objective

__all__ = ["Recipe", "adapter", "draft", "language_model", "lexical_units", "packed", "reference"]


@dataclass(frozen=True, kw_only=True)
class Recipe(Spec):
    """What a run is made of, before there is data for it.

    Args:
        objective: what is learned.
        training: how long and how fast.
        shape: of a new model; None for a run that starts from a model.
        blocks: for a draft model, how many of the starting model's blocks it is made of.
        measured: held-out tokens that are measured on.
        memory: what the model learns to read through, as `plait.load` takes it: a policy, such as
            `prflash:block=16`. What it draws is drawn anew in every step, and as in use for measurements.
    """

    objective: Objective
    training: Training
    shape: ModelShape | None = None
    blocks: Annotated[int, Field(ge=1)] | None = None
    measured: Annotated[int, Field(ge=2)] = 8192
    memory: str = FULL


def language_model() -> Recipe:
    """A small language model on texts of your own."""
    return Recipe(objective=NextToken(), training=Training(learning_rate=2e-3), shape=ModelShape())


def reference() -> Recipe:
    """A clean full-precision model of 11 million parameters on Python's library and manual.

    Its weights have never been on a grid, so that formats for fewer bits can be measured on it. 820,000
    tokens take about 20 minutes of one core.
    """
    return Recipe(
        objective=NextToken(),
        training=Training(
            steps=800, rows=1024, learning_rate=2e-3, warmup=40, save_every=20, evaluate_every=100
        ),
        shape=ModelShape(),
    )


def lexical_units() -> Recipe:
    """Tune a model to answer several placeholders at once."""
    return Recipe(
        objective=LexicalUnits(),
        training=Training(
            steps=400,
            rows=512,
            learning_rate=3e-4,
            warmup=20,
            weight_decay=0.0,
            save_every=50,
            evaluate_every=100,
        ),
        measured=2048,
    )


def adapter() -> Recipe:
    """Train an adapter on a model that stays as it is, in whatever format."""
    return Recipe(
        objective=NextToken(),
        training=Training(
            steps=200,
            rows=512,
            learning_rate=1e-3,
            warmup=20,
            weight_decay=0.0,
            save_every=50,
            evaluate_every=100,
        ),
        measured=4096,
    )


def packed() -> Recipe:
    """Tune a packed model towards the model that it was packed from."""
    return Recipe(
        objective=DeviationAware(),
        training=Training(
            steps=200,
            rows=1024,
            learning_rate=1e-3,
            warmup=10,
            weight_decay=0.0,
            save_every=25,
            evaluate_every=50,
        ),
        measured=2048,
    )


def draft() -> Recipe:
    """A draft model: some blocks of a model, taught to guess what the whole model says."""
    return Recipe(
        objective=Distillation(),
        training=Training(
            steps=300,
            rows=512,
            learning_rate=5e-4,
            warmup=20,
            weight_decay=0.0,
            save_every=50,
            evaluate_every=100,
        ),
        blocks=6,
        measured=1024,
    )
