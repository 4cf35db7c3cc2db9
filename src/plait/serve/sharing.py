"""What a key may do on all replicas together: the front counts, since each replica knows only its own requests."""

from __future__ import annotations

import json
import re
from typing import Any

from plait.serve.errors import HTTPError
from plait.serve.settings import Settings

__all__ = ["check_sessions", "new_sessions", "sequences"]

_GENERATES = re.compile(r"/v1/(?:completions|chat/completions|sessions/[^/]+/generate)")
_FORKS = re.compile(r"/v1/sessions/[^/]+/fork")


def sequences(method: str, path: str, body: bytes, settings: Settings) -> int:
    """How many sequences a request asks for; 0 for one that generates nothing.

    A body that is wrong, or asks for more than any request may, counts as one: a replica refuses it by name.
    """
    if method != "POST" or not _GENERATES.fullmatch(path):
        return 0
    fields = _fields(body)
    choices = max(_count(fields.get("n")), _count(fields.get("best_of")))
    prompt = fields.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    asked = choices * prompts
    return asked if asked <= settings.max_choices else 1


def new_sessions(method: str, path: str, body: bytes) -> int:
    """How many sessions a request would open."""
    if method != "POST":
        return 0
    if _FORKS.fullmatch(path):
        return _count(_fields(body).get("count"))
    return int(path == "/v1/sessions")


def check_sessions(open_now: int, more: int, settings: Settings) -> None:
    """Raise 429 if a key would have too many sessions."""
    most = settings.max_sessions_per_key
    if open_now + more > most:
        raise HTTPError(
            429,
            f"A key has at most {most} open sessions. Delete one first.",
            code="too_many_sessions",
            retry_after=1,
        )


def _fields(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return given if isinstance(given, dict) else {}


def _count(given: object) -> int:
    return given if isinstance(given, int) and given > 0 else 1
