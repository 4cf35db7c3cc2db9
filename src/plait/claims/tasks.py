"""Prompts by what is asked: talk, code to complete and to edit, text to copy, sums to work out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from plait.claims.prompts import chat_prompts, editing_prompts, repeating_prompts
from plait.claims.texts import source

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["TASKS", "code_prompts"]

_CODE = (
    ("textwrap", "TextWrapper"),
    ("json", "dumps"),
    ("heapq", "merge"),
    ("statistics", "quantiles"),
    ("argparse", "HelpFormatter"),
)

_SUMS = (
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell? Think step by step.",
    "A train goes 60 km in 45 minutes. How far does it go in two hours? Show every step.",
    "What is 17 * 23? Work it out step by step.",
    "A box holds 12 eggs. How many boxes are needed for 150 eggs? Explain.",
    "Solve 3x + 7 = 25 for x. Write every step on a line of its own.",
)


def code_prompts(lm: LanguageModel, characters: int = 1000) -> list[list[int]]:
    """Beginnings of code of the standard library, to be continued."""
    return [lm.encode(source(module, name)[:characters]) for module, name in _CODE]


def _sums(lm: LanguageModel) -> list[list[int]]:
    return [lm.encode_chat(question) for question in _SUMS]


TASKS: dict[str, Callable[[LanguageModel], list[list[int]]]] = {
    "chat": chat_prompts,
    "completion": code_prompts,
    "editing": editing_prompts,
    "copying": repeating_prompts,
    "mathematics": _sums,
}
