"""Search: several likely, or different, continuations of one prompt."""

from __future__ import annotations

from plait.decode.search.beam import BeamSearch, Hypothesis, beam_search
from plait.decode.search.diversity import DIVERSITIES, Diversity

__all__ = ["DIVERSITIES", "BeamSearch", "Diversity", "Hypothesis", "beam_search"]
