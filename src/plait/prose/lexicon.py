"""Where the words of English come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.hub import wordnet_folder
from plait.text.wordnet import WordNet
from plait.text.words import Lexicon

if TYPE_CHECKING:
    from plait.hub import Progress

__all__ = ["english_lexicon"]


def english_lexicon(*, progress: Progress | None = None, offline: bool | None = None) -> Lexicon:
    """The words of WordNet and their alternatives; WordNet is downloaded once, about 11 MB.

    Args:
        progress: told of the download.
        offline: never use the network; PLAIT_OFFLINE when left out.

    Raises:
        DownloadError: WordNet is not here and cannot be brought.
        MissingExtraError: `lemminflect` is not installed.
    """
    return Lexicon(WordNet(wordnet_folder(progress=progress, offline=offline)))
