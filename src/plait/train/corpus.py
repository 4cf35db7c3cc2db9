"""Real text and code that is on every machine: Python's standard library and its manual.

What there is depends on Python's version. It is split by module and by chapter, so that what is held out
shares no file with what is learned: modules whose names begin with a to m are learned, n to z held out.
"""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from plait.text import Tokenizer
from plait.train.data import TokenData

__all__ = ["Corpus", "encoded", "python_corpus", "python_sources"]

# Folders of the standard library that hold tests, data, or other people's packages.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
_LONGEST_FILE = 200_000
# Every so many chapters of the manual, one is held out.
_CHAPTERS = 8


class Corpus(NamedTuple):
    """Texts to learn from, and texts to measure on; a description of both."""

    learned: list[str]
    held_out: list[str]
    description: str


def python_sources() -> dict[str, str]:
    """Files of the standard library that are written in Python, by their path, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _LEFT_OUT.isdisjoint(parts) and path.stat().st_size <= _LONGEST_FILE:
            text = path.read_bytes().decode("utf-8", errors="ignore")
            if text.strip():
                found["/".join(parts)] = text
    return found


def python_corpus(code: float = 1.0) -> Corpus:
    """The standard library and the manual.

    Args:
        code: share of the source files to take, from the first of each split on.
    """
    sources = python_sources()
    learned = [text for path, text in sources.items() if _is_learned(path)]
    held_out = [text for path, text in sources.items() if not _is_learned(path)]
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    chapters = [text for _, text in sorted(topics.items())]
    learned = learned[: max(1, round(code * len(learned)))]
    learned += [text for number, text in enumerate(chapters) if number % _CHAPTERS]
    # A part is enough to measure on: every eighth file, and the chapters that were left out.
    return Corpus(
        learned,
        held_out[::8] + chapters[::_CHAPTERS],
        "Python's standard library, modules a to m, and its manual; held out: modules n to z, and every "
        f"{_CHAPTERS}th chapter",
    )


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> TokenData:
    """Texts as documents of ids, each with the token that ends a text behind it, where there is one."""
    end = [min(tokenizer.eos_ids)] if tokenizer.eos_ids else []
    return TokenData.of([[*ids, *end] for ids in tokenizer.encode_batch(list(texts))])


def _is_learned(path: str) -> bool:
    """Whether a file of the standard library belongs to a module that is learned from."""
    return path.lstrip("_")[:1].lower() <= "m"
