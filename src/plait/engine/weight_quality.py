"""How far a model in another form is from the model that it was made of, on a text.

Shapes: N rows of all windows, W width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError
from plait.memory import MemoryPlan, Rows
from plait.nn import Transformer

__all__ = ["Quality", "WeightJudge"]

# Rows of logits that are held at once, of either model.
_ROWS_AT_ONCE = 128


class Quality(NamedTuple):
    """What a model says to a text, against the reference.

    Attributes:
        nats: mean negative log-probability of the next token.
        divergence: mean Kullback-Leibler divergence of its law from the reference's, nats.
        agreement: fraction of places at which both have the same most likely token.
        tokens: predicted ones.
    """

    nats: float
    divergence: float
    agreement: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of `nats`."""
        return math.exp(min(700.0, self.nats))


class WeightJudge:
    """A reference model and windows of text; compares other models with it.

    What the reference thinks is kept as its hidden rows, and made into laws a few rows at a time.

    Args:
        reference: the model that others are compared with.
        windows: token ids, at least two in each.

    Raises:
        ConfigError: no window, or one of a single token.
    """

    def __init__(self, reference: Transformer, windows: Sequence[Sequence[int]]) -> None:
        if not windows or min(map(len, windows)) < 2:
            raise ConfigError("A model is judged on windows of at least 2 tokens. Give more text.")
        self.reference = reference
        self.windows = [torch.as_tensor(window, dtype=torch.int64) for window in windows]
        self._hidden = list(_hidden(reference, self.windows))

    @torch.inference_mode()
    def quality(self, model: Transformer | None = None) -> Quality:
        """Read the windows with a model, with the reference itself when left out.

        Raises:
            IncompatibleError: it has another vocabulary.
        """
        model = model or self.reference
        if model.config.vocab_size != self.reference.config.vocab_size:
            raise IncompatibleError(
                f"The models have {model.config.vocab_size} and {self.reference.config.vocab_size} tokens. "
                "Compare forms of one model."
            )
        nats = divergence = 0.0
        agreeing = tokens = 0
        mine = self._hidden if model is self.reference else _hidden(model, self.windows)
        for ids, true_rows, rows in zip(self.windows, self._hidden, mine, strict=True):
            for start in range(0, len(ids) - 1, _ROWS_AT_ONCE):
                span = slice(start, min(start + _ROWS_AT_ONCE, len(ids) - 1))
                law = model.logits(rows[span]).log_softmax(dim=-1)
                truth = self.reference.logits(true_rows[span]).log_softmax(dim=-1)
                following = ids[span.start + 1 : span.stop + 1, None]
                nats -= float(law.gather(1, following).double().sum())
                # Tokens that the model rules out have no finite logarithm in either law.
                terms = torch.where(truth == -torch.inf, 0.0, truth.exp() * (truth - law))
                divergence += float(terms.sum(dim=1, dtype=torch.float64).sum())
                agreeing += int((law.argmax(dim=1) == truth.argmax(dim=1)).sum())
                tokens += len(following)
        return Quality(nats / tokens, divergence / tokens, agreeing / tokens, tokens)


@torch.inference_mode()
def _hidden(model: Transformer, windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Hidden rows of each window, (N, W); through the native program where the model has one."""
    for ids in windows:
        past = model.new_past(MemoryPlan.parse("full"))
        yield model(ids, Rows([(len(ids), 0)]), [past])
