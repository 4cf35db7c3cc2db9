"""Prompts in which a chat model edits, copies, explains or just talks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.claims.texts import manual, source

if TYPE_CHECKING:
    from plait.engine import LanguageModel

__all__ = ["chat_prompts", "copying_prompts", "editing_prompts", "plain_prompts", "repeating_prompts"]

_QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Give me five tips for learning to play the piano.",
    "What is the difference between a list and a tuple in Python?",
    "Translate to French: The weather is beautiful today.",
)

_EDITS = (
    ("fnmatch", "filter", "Rename the argument pat to pattern. Print the whole function."),
    ("shutil", "which", "Add a comment above every if. Print the whole function."),
    ("textwrap", "indent", "Rename the argument text to document. Print the whole function."),
    ("statistics", "median", "Add type hints to the arguments. Print the whole function."),
)


def chat_prompts(lm: LanguageModel) -> list[list[int]]:
    """Questions of everyday chat."""
    return [lm.encode_chat(question) for question in _QUESTIONS]


def editing_prompts(lm: LanguageModel) -> list[list[int]]:
    """Requests for small edits of code, whose answers repeat most of it."""
    return [
        lm.encode_chat(f"{task}\n\n```python\n{source(module, name)}```") for module, name, task in _EDITS
    ]


def repeating_prompts(lm: LanguageModel) -> list[list[int]]:
    """Requests to repeat a passage."""
    passages = [passage for passage in manual().split("\n\n") if 300 < len(passage) < 600][:4]
    return [lm.encode_chat(f"Repeat this text:\n\n{passage}") for passage in passages]


def copying_prompts(lm: LanguageModel) -> list[list[int]]:
    """Requests whose answers repeat much of the prompt: edits of code, and passages to be repeated."""
    return editing_prompts(lm) + repeating_prompts(lm)


def plain_prompts(lm: LanguageModel) -> list[list[int]]:
    """Beginnings of texts, without the chat template."""
    starts = ("The history of computing began", "def fibonacci(n):", "Dear Sir or Madam,\n")
    return [lm.encode(start) for start in (*starts, manual()[:1500])]
