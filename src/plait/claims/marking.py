"""How strong a watermark in words is, by what a replacement may cost, on texts that are for calibrating alone."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from statistics import mean, median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from plait.decode.watermark import Detection
    from plait.prose import Candidates, Proposal
    from plait.text.words import Lexicon, Word

__all__ = ["LIMITS", "Known", "Strength", "calibrated", "smoothed", "strengths"]

LIMITS = (0.35, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Most nats that one replacement may cost, fixed before any text is seen."""


class Known:
    """Proposals of another source, which are asked for once: they do not depend on the key."""

    def __init__(self, source: Candidates) -> None:
        self.source = source
        self.of: dict[str, list[list[Proposal]]] = {}

    def propose(self, text: str, words: Sequence[Word], wanted: Sequence[int]) -> list[list[Proposal]]:
        if text not in self.of:
            self.of[text] = self.source.propose(text, words, wanted)
        return self.of[text]


class Strength(NamedTuple):
    """What a limit brings.

    Attributes:
        limit: of `Watermark.max_nats`.
        detected: share of marked texts that the fast detector finds.
        z: its median score.
        replaced: mean share of the words that is replaced.
        nats: mean cost of a replacement.
    """

    limit: float
    detected: float
    z: float
    replaced: float
    nats: float


def strengths(
    texts: Sequence[str], keys: Sequence[bytes], lexicon: Lexicon, source: Candidates
) -> Generator[str, None, list[Strength]]:
    """Mark texts with keys under every limit; yields a line now and then."""
    from plait.prose import Watermark

    known = source if isinstance(source, Known) else Known(source)
    found = []
    for limit in LIMITS:
        yield f"held-out texts, at most {limit:g} nats"
        marks = [Watermark(key, lexicon, known, max_nats=limit) for key in keys]
        marked = [mark.embed(text) for text in texts for mark in marks]
        found.append(
            Strength(
                limit,
                mean(one.detection.is_watermarked for one in marked),
                median(one.z for one in marked),
                mean(len(one.replaced) / one.words for one in marked),
                mean([each.nats for one in marked for each in one.replaced] or [0.0]),
            )
        )
    return found


def calibrated(found: Sequence[Strength], wanted: float) -> float:
    """The smallest limit with which a share `wanted` of the texts is found; infinite if there is none."""
    return min((one.limit for one in found if one.detected >= wanted), default=float("inf"))


def smoothed(found: Detection, rng: random.Random) -> float:
    """The p-value of a detection with its ties broken at random, so that it is uniform without a watermark."""
    from plait.decode.watermark import tail_of_binomial

    above = tail_of_binomial(found.ones + 1, found.n) if found.ones < found.n else 0.0
    return above + rng.random() * (found.p_value - above)
