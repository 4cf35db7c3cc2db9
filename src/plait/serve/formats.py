"""Answers in the forms of OpenAI's interface."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from plait.decode import Choice
from plait.engine import Generation
from plait.engine.trace import Trace
from plait.text import Tokenizer

__all__ = ["ChatLogprobs", "CompletionLogprobs", "Envelope", "trace_json", "usage"]

# What stands for a log-probability of minus infinity, which JSON does not have.
_IMPOSSIBLE = -9999.0


class Envelope:
    """What all parts of one answer have in common.

    Args:
        prefix: of the id, such as `chatcmpl`.
        kind: the `object` of the answer.
        model: name of the model.
    """

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.kind = kind
        self.model = model
        self.created = int(time.time())

    def wrap(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An answer, or a chunk of one."""
        head = {"id": self.id, "object": self.kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


def usage(prompts: Sequence[Sequence[int]], answers: Sequence[Generation]) -> dict[str, Any]:
    """Tokens of a request: each prompt counts once, every generated token counts."""
    read = sum(map(len, prompts))
    written = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(answer.shared_tokens for answer in answers)},
    }


class ChatLogprobs:
    """Log-probabilities as chat answers have them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The part of an answer that belongs to some tokens."""
        content = [
            {
                **self._token(choice.token, choice.logprob),
                "top_logprobs": [self._token(other.token, other.logprob) for other in choice.alternatives],
            }
            for choice in choices
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self.tokenizer.shown_bytes(token, skip_special=False)
        return {"token": data.decode("utf-8", "replace"), "logprob": _number(logprob), "bytes": list(data)}


class CompletionLogprobs:
    """Log-probabilities as completions have them; offsets count on from piece to piece of a stream.

    Args:
        offset: characters in front of the answer, those of an echoed prompt.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self.tokenizer = tokenizer
        self.offset = offset

    def __call__(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The part of an answer that belongs to some tokens."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "bytes")
        told: dict[str, Any] = {name: [] for name in names}
        for choice in choices:
            text = self._text(choice.token)
            told["tokens"].append(text)
            told["token_logprobs"].append(_number(choice.logprob))
            best = {
                self._text(other.token): _number(other.logprob) for other in reversed(choice.alternatives)
            }
            told["top_logprobs"].append(dict(reversed(best.items())))
            told["text_offset"].append(self.offset)
            told["bytes"].append(list(self.tokenizer.shown_bytes(choice.token, skip_special=False)))
            self.offset += len(text)
        return told

    def _text(self, token: int) -> str:
        return self.tokenizer.shown_bytes(token, skip_special=False).decode("utf-8", "replace")


def trace_json(trace: Trace, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a step did, for the playground."""
    draft = trace.draft
    return {
        "strands": [strand._asdict() for strand in trace.strands],
        "draft": {
            "tokens": [
                tokenizer.shown_bytes(token, skip_special=False).decode("utf-8", "replace")
                for token in draft.tokens
            ],
            "parents": list(draft.parents),
            "accepted": list(draft.accepted),
        },
    }


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _IMPOSSIBLE)
