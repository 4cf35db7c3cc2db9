"""A small model trained here, packed models tuned towards theirs, and what that comes to; for claims.

Shapes: N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from plait.claims.claim import Run
    from plait.engine import LanguageModel
    from plait.nn import Transformer
    from plait.text import Tokenizer
    from plait.train import Corpus, Recipe, TokenData

__all__ = [
    "Learned",
    "Tuning",
    "adapter_learned",
    "byte_model",
    "model_learned",
    "small_model",
    "tuned",
    "unsure_nats",
    "windows_of",
]


class Tuning(NamedTuple):
    """What a run of tuning came to.

    Attributes:
        folder: of the packed model.
        changed: code groups that changed, over all steps.
        losses: of every step.
    """

    folder: Path
    changed: int
    losses: list[float]


class Learned(NamedTuple):
    """What a short run on SmolLM2 came to.

    Attributes:
        before, after: nats a token of held-out text.
        parameters: numbers that were trained.
        nbytes: of the file of the adapter; 0 for a whole model.
        seconds: of the run, with both measurements.
    """

    before: float
    after: float
    parameters: int
    nbytes: int
    seconds: float


def adapter_learned(
    run: Run, method: str, weights: str, *, steps: int = 40, learning_rate: float = 1e-3
) -> Learned:
    """Train an adapter beside SmolLM2 kept in `weights`, on steps of 256 tokens of Python's library, and measure it."""
    from plait.train import finish, tune_adapter
    from plait.weights.adapters import ADAPTERS

    with tempfile.TemporaryDirectory() as folder:
        trainer = tune_adapter(
            ADAPTERS.parse(method),
            "smollm2",
            lambda tokenizer: _library(run, tokenizer),
            Path(folder),
            weights=weights,
            recipe=_short(run, steps, learning_rate),
        )
        result = finish(trainer, Path(folder))
        assert result.held_out_before is not None
        assert result.held_out is not None
        nbytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
        return Learned(result.held_out_before, result.held_out, result.parameters, nbytes, result.seconds)


def model_learned(run: Run, *, steps: int = 40, learning_rate: float = 1e-4) -> Learned:
    """Train all of SmolLM2 in fp32 on the same steps, and measure it on the same text."""
    from plait.train import open_start, tune

    model, tokenizer, _ = open_start("smollm2")
    learned, held_out = _library(run, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = tune(
            _short(run, steps, learning_rate), "smollm2", model, tokenizer, learned, held_out, Path(folder),
            corpus="Python's library",
        )  # fmt: skip
        started = time.perf_counter()
        held = trainer.run("the whole model").held_out
        seconds = time.perf_counter() - started
    count = sum(parameter.numel() for parameter in trainer.trained.parameters())
    return Learned(held[0][1], held[-1][1], count, 0, seconds)


def _short(run: Run, steps: int, learning_rate: float) -> Recipe:
    from plait.train import adapter

    recipe = adapter()
    training = dataclasses.replace(
        recipe.training, steps=run.pick(steps, 1), rows=run.pick(256, 32), warmup=run.pick(5, 1),
        learning_rate=learning_rate, evaluate_every=10_000, save_every=10_000, seed=run.seed,
    )  # fmt: skip
    return dataclasses.replace(recipe, training=training, measured=run.pick(2048, 64))


def _library(run: Run, tokenizer: Tokenizer) -> tuple[TokenData, TokenData]:
    """Modules of Python's library to learn from, and others with chapters of the manual to measure on."""
    from plait.train import encoded, python_corpus

    corpus = python_corpus(code=0.05)
    return (
        encoded(corpus.learned[: run.pick(100, 3)], tokenizer),
        encoded(corpus.held_out[-run.pick(20, 2) :], tokenizer),
    )


def byte_model(
    run: Run, corpus: Corpus, *, rows: int, trained: int, steps: int = 600, memory: str = "full", **shape: Any
) -> LanguageModel:
    """A model of bytes with 2 blocks of width 96, trained here, and loaded.

    Args:
        rows: bytes of a step.
        trained: bytes of the longest piece of text in training.
        steps: of a run that is not quick.
        memory: what it learns to read through.
        shape: further fields of `plait.train.ModelShape`; the context is `trained` when left out.
    """
    from plait.engine import load
    from plait.train import ModelShape, Training, finish, language_model, train_new

    sizes = {
        "width": 96,
        "blocks": 2,
        "heads": 4,
        "kv_heads": 4,
        "inner": 256,
        "vocab_size": 258,
        "context": trained,
    }
    recipe = dataclasses.replace(
        language_model(),
        shape=ModelShape(**{**sizes, **shape}),
        training=Training(
            steps=run.pick(steps, 4), rows=rows, context=trained, learning_rate=3e-3, save_every=10_000,
            evaluate_every=10_000, seed=run.seed,
        ),
        measured=run.pick(2048, 256),
        memory=memory,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        finish(train_new(recipe, corpus, Path(folder)), Path(folder))
        return load(folder)


def small_model(run: Run, folder: Path, blocks: int = 4) -> Generator[str, None, tuple[Path, Corpus]]:
    """A model of 0.9 million parameters on Python's library and manual, and what it was trained on; 1.3 with 6 blocks.

    Its matrices are wide enough for codebooks of 256 runs of 8 weights.
    """
    from plait.train import ModelShape, Training, finish, language_model, python_corpus, train_new

    yield "training a small model"
    corpus = python_corpus(code=run.pick(0.5, 0.01))
    recipe = dataclasses.replace(
        language_model(),
        shape=ModelShape(
            width=128, blocks=blocks, heads=4, kv_heads=2, inner=384, vocab_size=run.pick(512, 300), context=128
        ),
        training=Training(
            steps=run.pick(1200, 40), rows=run.pick(1024, 256), context=128, learning_rate=3e-3,
            warmup=run.pick(40, 2), save_every=10_000, evaluate_every=10_000, seed=run.seed,
        ),
    )  # fmt: skip
    finish(train_new(recipe, corpus, folder), folder)
    return folder, corpus


def tuned(
    model: str | Path,
    packed: Path,
    folder: Path,
    method: str,
    texts: TokenData | Sequence[str],
    *,
    objective: str = "dad",
    steps: int,
    rows: int,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Tuning:
    """Tune a packed model towards the model that it was made of.

    Args:
        texts: to tune on, as tokens or as texts.
        rows: tokens of one step.
    """
    from plait.train import OBJECTIVES, TUNERS, TokenData, Training, encoded, finish, tune_weights
    from plait.train import packed as recipe

    chosen = dataclasses.replace(
        recipe(),
        objective=OBJECTIVES.parse(objective),
        training=Training(
            steps=steps, rows=rows, context=min(rows, 256), learning_rate=learning_rate, warmup=max(1, steps // 20),
            weight_decay=0.0, save_every=10_000, evaluate_every=10_000, seed=seed,
        ),
    )  # fmt: skip
    trainer = tune_weights(
        TUNERS.parse(method),
        packed,
        str(model),
        lambda tokenizer: (
            (texts if isinstance(texts, TokenData) else encoded(texts, tokenizer)).first(steps * rows + rows),
            None,
        ),
        folder,
        recipe=chosen,
    )
    finish(trainer, folder)
    return Tuning(folder, trainer.changed_codes, trainer.losses)


def windows_of(ids: Sequence[int], count: int, tokens: int) -> list[list[int]]:
    """The first `count` runs of `tokens` ids."""
    return [list(ids[at : at + tokens]) for at in range(0, count * tokens, tokens)]


def unsure_nats(
    reference: Transformer, model: Transformer, windows: Sequence[Sequence[int]]
) -> tuple[float, int]:
    """Mean nats of the next token where the reference is least sure: the third of highest entropy. And how many."""
    import torch

    from plait.memory import Rows

    def logits(of: Transformer, ids: Tensor) -> Tensor:
        return of.logits(of(ids, Rows([(len(ids), 0)])))[:-1].log_softmax(dim=-1)

    entropies, nats = [], []
    with torch.no_grad():
        for window in windows:
            ids = torch.as_tensor(window, dtype=torch.int64)
            entropies.append(torch.special.entr(logits(reference, ids).exp()).sum(dim=1))
            nats.append(-logits(model, ids).gather(1, ids[1:, None])[:, 0])
    entropy, all_nats = torch.cat(entropies), torch.cat(nats)
    most = entropy.topk(max(1, len(entropy) // 3)).indices
    return float(all_nats[most].mean()), len(most)
