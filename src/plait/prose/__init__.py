"""English prose: watermarks."""

from __future__ import annotations

from plait.prose.lexicon import english_lexicon
from plait.prose.thesaurus import Candidates, Proposal, ThesaurusCandidates
from plait.prose.watermark import Marked, Replacement, Watermark

__all__ = [
    "Candidates",
    "Marked",
    "Proposal",
    "Replacement",
    "ThesaurusCandidates",
    "Watermark",
    "english_lexicon",
]
