"""From logits to tokens."""

from __future__ import annotations

from plait.decode.constraint import Constraint, Guide
from plait.decode.history import History, token_ids
from plait.decode.randomness import Streams
from plait.decode.sampler import Alternative, Choice, Sampler, choose_many, draw
from plait.decode.sampling import Sampling

__all__ = [
    "Alternative",
    "Choice",
    "Constraint",
    "Guide",
    "History",
    "Sampler",
    "Sampling",
    "Streams",
    "choose_many",
    "draw",
    "token_ids",
]
