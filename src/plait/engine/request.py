"""What is asked of the engine, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from plait.decode import Choice, Constraint, Sampling
from plait.engine.trace import Trace
from plait.errors import ConfigError

__all__ = ["Beam", "FinishReason", "Generation", "Piece", "Request", "Suggestion"]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to continue.

    Args:
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        max_new_tokens: most tokens to generate, at least 1.
        stop: texts that end the generation; they are not part of the answer.
        ignore_end: go on after an end-of-sequence token.
        tenant: on whose behalf: tenants get equal shares of an engine, and never share what is remembered.
        branch: tells apart requests with one seed; from 0 on.
        constraint: what the answer may be; None for anything.
        adapter: the name of the adapter to answer with; empty for the engine's own choice, `none` for the model as it is.
        trace: whether each piece tells what the memory and the draft did. It costs one more row a step.

    Raises:
        ConfigError: an empty prompt or stop text, `max_new_tokens` below 1, or `branch` below 0.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    tenant: str = ""
    branch: int = 0
    constraint: Constraint | None = None
    trace: bool = False
    adapter: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.prompt, (str, bytes)) or not isinstance(self.prompt, Sequence):
            raise ConfigError(
                f"prompt must be a list of token ids. Got {type(self.prompt).__name__}; encode makes ids of a text, and "
                "tolist makes a list of a tensor."
            )
        if not self.prompt:
            raise ConfigError("The prompt is empty. Give at least one token.")
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise ConfigError(f"max_new_tokens must be a whole number. Got {self.max_new_tokens!r}.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1. Got {self.max_new_tokens}.")
        if isinstance(self.branch, bool) or not isinstance(self.branch, int) or self.branch < 0:
            raise ConfigError(f"branch must be a whole number of at least 0. Got {self.branch!r}.")
        if not isinstance(self.sampling, Sampling):
            raise ConfigError(f"sampling must be a plait.Sampling. Got {self.sampling!r}.")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop must be non-empty texts. Got {list(self.stop)!r}.")


class Piece(NamedTuple):
    """What one step added to a generation.

    Attributes:
        text: new text, whole UTF-8 characters only; may be empty while a character or a possible
            stop text is incomplete.
        choices: the tokens chosen in this step, with log-probabilities where they were asked for.
        finish_reason: why the generation ended, on its last piece; None before.
        trace: what the memory and the draft did, where the request asked for it.
    """

    text: str
    choices: tuple[Choice, ...]
    finish_reason: FinishReason | None = None
    trace: Trace | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished answer.

    Args:
        text: the answer, without the stop text or special tokens.
        tokens: ids generated, the end-of-sequence token included where one was chosen.
        choices: the same tokens with log-probabilities where they were asked for.
        finish_reason: `stop` (end of sequence or a stop text), `length` (`max_new_tokens` or the
            model's context is used up) or `cancelled`.
        prompt_tokens: number of tokens of the prompt.
        shared_tokens: how many of them were remembered already when the answer began.
        seconds_to_first_token, seconds: wall time from submission.
    """

    text: str
    tokens: tuple[int, ...]
    choices: tuple[Choice, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    shared_tokens: int
    seconds_to_first_token: float
    seconds: float

    def __str__(self) -> str:
        return self.text


class Beam(NamedTuple):
    """A continuation that a beam search found.

    Attributes:
        text: without the end token.
        tokens: ids, the end token included where there is one.
        logprob: sum of the model's log-probabilities of the tokens, in nats.
        score: that sum with the diversity penalties, divided by the length to the length penalty.
        group: which group found it, from 0 on.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    score: float
    group: int


class Suggestion(NamedTuple):
    """A short draft of what may follow.

    Attributes:
        text: without the end token.
        tokens: ids, the end token included where there is one.
        logprob: sum of the model's log-probabilities, in nats, when the draft is read alone.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
