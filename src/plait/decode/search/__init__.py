"""Search: several likely, or different, continuations of one prompt."""

from __future__ import annotations

from plait.decode.search.beam import BeamSearch, Hypothesis, beam_search
from plait.decode.search.diversity import DIVERSITIES, Diversity
from plait.decode.search.superposed import Draft, Superposed, superposed_drafts

__all__ = [
    "DIVERSITIES",
    "BeamSearch",
    "Diversity",
    "Draft",
    "Hypothesis",
    "Superposed",
    "beam_search",
    "superposed_drafts",
]
