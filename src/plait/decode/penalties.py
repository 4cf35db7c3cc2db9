"""Changes of single logits before the law is made: biases, bans and penalties on repetition.

Shapes: V vocabulary. All functions change `logits` (V,) in place and touch only the tokens concerned.
The few values are computed in float64, so no finite logit can become NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.decode.history import History

__all__ = ["Bias", "penalise"]


class Bias:
    """Numbers added to chosen logits; `-inf` bans a token, whatever its logit.

    Args:
        bias: token id to a finite number or `-inf`; ids are in [0, V).
    """

    def __init__(self, bias: Mapping[int, float]) -> None:
        added = {token: value for token, value in bias.items() if value != -np.inf}
        self._banned = np.array([token for token in bias if token not in added], dtype=np.int64)
        self._ids = np.array(list(added), dtype=np.int64)
        self._values = np.array(list(added.values()), dtype=np.float64)

    def apply(self, logits: npt.NDArray[np.floating[Any]]) -> None:
        """Add every bias."""
        logits[self._ids] = logits[self._ids] + self._values
        logits[self._banned] = -np.inf


def penalise(
    logits: npt.NDArray[np.floating[Any]],
    history: History,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Lower (or raise) the logits of tokens that have occurred.

    Repetition (Keskar et al. 2019, arXiv:1909.05858, section 4.1; as in Hugging Face and vLLM): a token of
    the prompt or the generated text has a positive logit divided, a negative one multiplied by `repetition`.
    Presence and frequency (OpenAI's definition): then, over generated tokens only, with count c,
    `logit -= frequency * c + presence * (c > 0)`.

    Ids outside the vocabulary, as some prompts have for images, are left out.
    """
    ids, counts, in_prompt = history.counts()
    inside = ids < len(logits)
    ids, counts, in_prompt = ids[inside], counts[inside], in_prompt[inside]
    values = logits[ids].astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        repeated = np.where(values < 0, values * repetition, values / repetition)
        values = np.where(in_prompt | (counts > 0), repeated, values)
        values -= frequency * counts + presence * (counts > 0)
        logits[ids] = values
