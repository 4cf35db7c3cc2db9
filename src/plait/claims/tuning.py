"""A small model trained here, packed models tuned towards theirs, and what that comes to; for claims.

Shapes: N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from plait.claims.claim import Run
    from plait.nn import Transformer
    from plait.train import Corpus, TokenData

__all__ = ["Tuning", "small_model", "tuned", "unsure_nats", "windows_of"]


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
