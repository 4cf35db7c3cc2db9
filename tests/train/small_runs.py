"""Small runs that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import torch

from plait.nn import Transformer
from plait.train import ModelShape, NextToken, RunConfig, TokenData, Trainer, Training
from plait.train.objectives import Objective
from plait.train.objectives.distillation import with_laws
from plait.train.runs import fresh_parameters

__all__ = ["VOCABULARY", "new_trainer", "run_config", "small_data", "small_shape"]

VOCABULARY, PLACEHOLDER = 40, 1


def small_shape() -> ModelShape:
    return ModelShape(width=32, blocks=2, heads=2, kv_heads=1, inner=48, vocab_size=300, context=64)


def run_config(objective: Objective | None = None, **training: object) -> RunConfig:
    """A run of 12 steps of 48 tokens of a model of two blocks."""
    settings: dict[str, object] = {
        "steps": 12, "rows": 48, "context": 20, "warmup": 2, "save_every": 4, "evaluate_every": 5,
        "learning_rate": 5e-3,
    }  # fmt: skip
    return RunConfig(
        model=small_shape().transformer(VOCABULARY, PLACEHOLDER),
        objective=objective or NextToken(),
        training=Training(**(settings | training)),  # type: ignore[arg-type]
    )


def small_data(documents: int = 12, seed: int = 0) -> TokenData:
    """Documents of several lengths in which most tokens follow from the one before, with a random teacher's laws."""
    random = torch.Generator().manual_seed(seed)
    lists = []
    for number in range(documents):
        ids = [2 + number]
        for _ in range(10 + 3 * number):
            jump = int(torch.randint(0, 5, (1,), generator=random)) == 0
            step = int(torch.randint(1, 38, (1,), generator=random)) if jump else 1
            ids.append(2 + (ids[-1] - 2 + step) % (VOCABULARY - 2))
        lists.append(ids)
    data = TokenData.of(lists)
    noise = torch.rand(len(data), generator=random)
    config = small_shape().transformer(VOCABULARY, PLACEHOLDER)
    teacher = Transformer(config, fresh_parameters(config.blocks, 1))
    return with_laws(data, teacher, top=8).with_notes({"confidence": noise})


def new_trainer(folder: Path, config: RunConfig | None = None) -> Trainer:
    config = config or run_config()
    model = Transformer(config.model, fresh_parameters(config.model.blocks, config.training.seed))
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, model, small_data(), small_data(3, seed=9), folder)
