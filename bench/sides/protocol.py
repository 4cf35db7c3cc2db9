"""How a side talks to the contest: one JSON task a line on standard input, one JSON answer a line on standard output.

Standard library only, because every side runs in an environment of its own.

A task is `{"prompts": [[ids], ...], "tokens": n, "shared": k}`: continue every prompt greedily by n tokens, all at
once; the first k tokens of all prompts are the same. The answer is `{"tokens": [[ids], ...], "first": s, "begun": n,
"seconds": s, "steps": [s, ...], "peak": bytes}`: seconds until every prompt had its first token, the tokens that there
were by then, seconds in all, seconds of each step after the first token (when several prompts run, of each step of the
whole batch; a step that checks guesses may bring several tokens), and the largest resident memory so far. With `"apart":
true` prompts are continued one after the other, and the numbers are those of all of them together.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Clock", "settings", "serve"]

Answer = Callable[..., dict[str, Any]]


def settings() -> dict[str, Any]:
    """What the contest asks of this side: model path, threads, context and so on."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


class Clock:
    """Times the steps of one task.

    Args:
        num_prompts: how many prompts are continued at once.
    """

    def __init__(self, num_prompts: int) -> None:
        self.start = time.perf_counter()
        self.first: float | None = None
        self.begun = 0
        self.marks: list[float] = []
        self.num_prompts = num_prompts

    def step(self, started: int, tokens: int | None = None) -> None:
        """A step ended, after which `started` prompts have a token or more; `tokens` in all, one each if left out."""
        now = time.perf_counter()
        if started >= self.num_prompts:
            if self.first is None:
                self.first = now - self.start
                self.begun = started if tokens is None else tokens
            self.marks.append(now)

    def answer(self, tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The answer to the task; the time ends here."""
        seconds = time.perf_counter() - self.start
        return {
            "tokens": [[int(token) for token in each] for each in tokens],
            "first": self.first,
            "begun": self.begun,
            "seconds": seconds,
            "steps": [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)],
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def serve(version: str, answer: Answer) -> None:
    """Say that the side is ready, then answer tasks until standard input ends."""
    # Libraries print to standard output too; answers go to what it was, the rest to standard error.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True, "version": version}), file=channel, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        prompts = task.pop("prompts") if task.pop("apart", False) else None
        found = answer(**task) if prompts is None else _together([answer([one], **task) for one in prompts])
        print(json.dumps(found), file=channel, flush=True)


def _together(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One answer of the answers to prompts that were continued one after the other."""
    return {
        "tokens": [own for one in answers for own in one["tokens"]],
        "first": sum(one["first"] for one in answers),
        "begun": sum(one["begun"] for one in answers),
        "seconds": sum(one["seconds"] for one in answers),
        "steps": [step for one in answers for step in one["steps"]],
        "peak": max(one["peak"] for one in answers),
    }
