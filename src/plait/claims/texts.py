"""Real text that is on every machine: Python's own manual and standard library.

The text depends on Python's version, which every result states.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plait.claims.claim import MeasurementError

if TYPE_CHECKING:
    from plait.text import Tokenizer

__all__ = ["chapters", "manual", "module_source", "other_manual", "source", "token_runs"]

_TOPICS = ("assignment", "class", "typesseq", "compound", "typesmapping", "import", "execmodel", "with")


def manual() -> str:
    """Chapters of Python's reference manual, about 100,000 characters of English with examples."""
    topics = chapters()
    return "\n\n".join(topics[name] for name in _TOPICS)


def chapters() -> dict[str, str]:
    """Every chapter of Python's reference manual that comes with it, by name."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return dict(sorted(topics.items()))


def other_manual() -> list[str]:
    """The chapters of the reference manual that `manual` leaves out, about 600,000 characters."""
    return [text for name, text in chapters().items() if name not in _TOPICS]


def source(module: str, name: str) -> str:
    """The source of a class or function of the standard library, such as `("textwrap", "dedent")`."""
    return inspect.getsource(getattr(importlib.import_module(module), name))


def module_source(module: str) -> str:
    """The source of a module of the standard library, such as `"textwrap"`."""
    return inspect.getsource(importlib.import_module(module))


def token_runs(tokenizer: Tokenizer, lengths: Sequence[int]) -> list[list[int]]:
    """Consecutive runs of the manual's tokens, of these lengths.

    Raises:
        MeasurementError: the manual of this Python is shorter than that.
    """
    ids = tokenizer.encode(manual())
    if len(ids) < sum(lengths):
        raise MeasurementError(f"Python's manual has {len(ids)} tokens here; {sum(lengths)} are needed.")
    runs, start = [], 0
    for length in lengths:
        runs.append(ids[start : start + length])
        start += length
    return runs
