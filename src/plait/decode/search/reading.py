"""What every search begins with: a prompt that is checked and read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.errors import CapacityError, ConfigError
from plait.memory import MemoryPlan, Past, Rows
from plait.nn import Transformer

__all__ = ["read_prompt"]

_ROWS_AT_ONCE = 512


def read_prompt(
    model: Transformer, plan: MemoryPlan, prompt: Sequence[int], max_new_tokens: int
) -> tuple[Past, Tensor, int]:
    """Read a prompt.

    Returns:
        Its memory; the logits of what follows, (1, V) float64; and the tokens that may be generated, which
        are fewer than asked for where the model's context ends.

    Raises:
        ConfigError: an empty prompt, an id outside the vocabulary, or no token to generate.
        CapacityError: the prompt fills the model's context.
    """
    limit = model.config.max_positions
    if not prompt or max_new_tokens < 1:
        raise ConfigError(
            "A search needs a prompt and a max_new_tokens of at least 1. "
            f"Got {len(prompt)} tokens and {max_new_tokens}."
        )
    if len(prompt) >= limit:
        raise CapacityError(
            f"The prompt has {len(prompt)} tokens; the model's context is {limit}, the answer included. "
            "Shorten the prompt."
        )
    past = model.new_past(plan)
    while True:
        piece = torch.tensor(prompt[len(past) : len(past) + _ROWS_AT_ONCE], dtype=torch.int64)
        hidden = model(piece, Rows([(len(piece), len(past))]), [past])
        is_whole = len(past) == len(prompt)
        past.commit(is_prompt=not is_whole)
        if is_whole:
            logits = model.logits(hidden[-1:]).cpu().double()
            return past, logits, min(max_new_tokens, limit - len(prompt))
