"""SmolLM2's logits equal those of Transformers, and lie at least as near to the exact ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run
from plait.claims.greedy import NEEDS, load_peer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from plait.engine import LanguageModel

__all__ = ["CLAIM"]

# Rows of float64 logits held at once: 256 rows of 49,152 words are 100 MB.
_ROWS_AT_ONCE = 256


def _logits(lm: LanguageModel, tokens: Sequence[int]) -> Tensor:
    """Logits of every position of one prompt read at once, (T, V)."""
    import torch

    from plait.memory import Rows

    past = lm.model.new_past(lm.plan)
    return lm.model.logits(lm.model(torch.tensor(tokens), Rows([(len(tokens), 0)]), [past]))


def _measure(run: Run) -> Measurements:
    import torch

    from plait.claims.float64 import hidden_rows
    from plait.claims.texts import token_runs
    from plait.engine import load
    from plait.hub import resolve

    yield "loading SmolLM2 three times"
    exact_angles, usual_angles = (
        load("smollm2", weights="fp32"),
        load("smollm2", weights="fp32", angles="fp32"),
    )
    peer = load_peer(resolve("smollm2"))
    state = peer.state_dict()
    head = state["lm_head.weight"].double()
    lengths = run.pick((20, 50, 100, 200, 500, 1000, 2000), (20, 60))
    ours, theirs = _Errors(), _Errors()
    differences: list[float] = []
    with torch.inference_mode():
        for tokens in token_runs(exact_angles.tokenizer, lengths):
            yield f"{len(tokens)} tokens"
            peer_logits = peer(torch.tensor([tokens])).logits[0]
            like_peer = _logits(usual_angles, tokens)
            differences.extend((like_peer - peer_logits).abs().amax(dim=1).tolist())
            logits = _logits(exact_angles, tokens)
            exact_hidden = hidden_rows(state, peer.config, tokens)
            for low in range(0, len(tokens), _ROWS_AT_ONCE):
                rows = slice(low, low + _ROWS_AT_ONCE)
                exact = exact_hidden[rows] @ head.T
                ours.add(logits[rows] - exact)
                theirs.add(peer_logits[rows] - exact)
    positions = sum(lengths)
    return {
        "max_difference": Quantity.largest(differences, ""),
        "error": Quantity(ours.mean, "", samples=positions),
        "error_of_transformers": Quantity(theirs.mean, "", samples=positions),
        "error_ratio": Quantity(ours.mean / theirs.mean, ""),
        "max_error": Quantity.largest(ours.largest, ""),
        "max_error_of_transformers": Quantity.largest(theirs.largest, ""),
    }


class _Errors:
    """Root mean square and largest magnitude of errors that come in blocks of rows."""

    def __init__(self) -> None:
        self.squares, self.count = 0.0, 0
        self.largest: list[float] = []

    def add(self, errors: Tensor) -> None:
        self.squares += float(errors.square().sum())
        self.count += errors.numel()
        self.largest.extend(errors.abs().amax(dim=1).tolist())

    @property
    def mean(self) -> float:
        return math.sqrt(self.squares / self.count)


CLAIM = Claim(
    name="same-logits",
    title="The same logits as Transformers",
    headline=(
        "A model gives the logits that Hugging Face Transformers gives, and its default rotary angles bring them at "
        "least as near to a float64 run as Transformers is."
    ),
    scale=(
        "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised to fp32 on both sides); every position of runs of Python's "
        "manual of 20, 50, 100, 200, 500, 1,000 and 2,000 tokens. The difference is taken with fp32 angles, which "
        "Transformers uses; the errors, as root mean square over all positions and words, against a float64 forward "
        "pass with the default angles."
    ),
    bars=(
        Bar(
            quantity="max_difference",
            relation="<=",
            value=1e-4,
            unit="",
            why="Logits are about 20 here; two orders of fp32 summation over 30 layers differ by a few 1e-5.",
        ),
        Bar(
            quantity="error_ratio",
            relation="<=",
            value=1.0,
            unit="",
            why="Angles formed in fp64 must pay: our error is at most that of Transformers.",
        ),
    ),
    measure=_measure,
    needs=NEEDS,
)
