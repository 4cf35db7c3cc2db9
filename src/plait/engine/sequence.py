"""A request while it runs: what it has read and written, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence

from plait.decode import Choice, History, Sampler
from plait.engine.request import FinishReason, Generation, Piece, Request
from plait.memory import Past
from plait.nn import Adapter
from plait.text import StopStrings, StreamDecoder, Tokenizer

__all__ = ["RunningSequence"]


class RunningSequence:
    """A request and everything that changes while it is answered.

    While it runs, its past holds every token but the last one chosen, whose keys and values are written
    when it is fed in the next step. A sequence that waits has no past, unless the caller gave it one.

    Args:
        request: what was asked.
        past: the caller's own past, which holds a prefix of the prompt and is used in place; None for
            one that the engine makes, shares and drops as it needs.
        tokenizer: for the text of the answer.
        sampler: bound to the request's sampling and the model's vocabulary.
        max_positions: the model's context in tokens.
        adapter: what changes the model for it.

    Attributes:
        arrival: place in the order of submission.
        error: what went wrong, if that is why it was cancelled.
        has_begun: whether it has begun to read; what it held then was computed by others.
        shared_tokens: tokens that did not have to be read when it began.
    """

    def __init__(
        self,
        request: Request,
        past: Past | None,
        tokenizer: Tokenizer,
        sampler: Sampler,
        max_positions: int,
        adapter: Adapter | None = None,
    ) -> None:
        self.request = request
        self.adapter = adapter
        self.past = past
        self.is_pinned = past is not None
        self.arrival = 0
        self.error: Exception | None = None
        self.has_begun = False
        self.shared_tokens = held_by(past)
        self.sampler = sampler
        self.max_positions = max_positions
        self.tokens: list[int] = list(request.prompt)
        self.history = History(request.prompt)
        self.choices: list[Choice] = []
        self.finish_reason: FinishReason | None = None
        self._end_tokens = frozenset() if request.ignore_end else tokenizer.eos_ids
        self._decoder = StreamDecoder(tokenizer, continues=True)
        self._stops = StopStrings(request.stop)
        self._texts: list[str] = []
        self._started = time.monotonic()
        self._first_token_at: float | None = None

    @property
    def tenant(self) -> str:
        """On whose behalf it runs."""
        return self.request.tenant

    @property
    def held(self) -> int:
        """Tokens that the past holds."""
        return held_by(self.past)

    @property
    def unread(self) -> list[int]:
        """Tokens that the past does not hold yet; the last token is always one of them."""
        return self.tokens[self.held :]

    @property
    def is_reading(self) -> bool:
        """Whether more is to be read than the last token."""
        return len(self.tokens) - self.held > 1

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.finish_reason is not None

    def accept(self, choices: Sequence[Choice]) -> Piece:
        """Add chosen tokens until one of them ends the generation.

        Returns:
            The text that became complete, and the tokens that were kept.
        """
        if self._first_token_at is None:
            self._first_token_at = time.monotonic()
        texts = []
        kept = 0
        for choice in choices:
            kept += 1
            self.tokens.append(choice.token)
            self.history.append(choice.token)
            self.choices.append(choice)
            if choice.token in self._end_tokens:
                self.finish_reason = "stop"
            else:
                texts.append(self._emit(self._decoder.push(choice.token)))
            if self.finish_reason is None and (
                len(self.choices) >= self.request.max_new_tokens or len(self.tokens) >= self.max_positions
            ):
                self.finish_reason = "length"
            if self.finish_reason is not None:
                break
        if self.finish_reason is not None:
            texts.append(self._flush())
        text = "".join(texts)
        self._texts.append(text)
        return Piece(text, tuple(choices[:kept]), self.finish_reason)

    def cancel(self) -> Piece:
        """End the generation where it is."""
        self.finish_reason = "cancelled"
        text = self._flush()
        self._texts.append(text)
        return Piece(text, (), self.finish_reason)

    def result(self) -> Generation:
        """The answer so far."""
        now = time.monotonic()
        return Generation(
            text="".join(self._texts),
            tokens=tuple(choice.token for choice in self.choices),
            choices=tuple(self.choices),
            finish_reason=self.finish_reason or "cancelled",
            prompt_tokens=len(self.request.prompt),
            shared_tokens=self.shared_tokens,
            seconds_to_first_token=(self._first_token_at or now) - self._started,
            seconds=now - self._started,
        )

    def _emit(self, text: str) -> str:
        text, stopped = self._stops.push(text)
        if stopped:
            self.finish_reason = "stop"
        return text

    def _flush(self) -> str:
        """Text held back for a character or a stop text that will not be completed."""
        return self._emit(self._decoder.finish()) + self._stops.finish()


def held_by(past: Past | None) -> int:
    """Tokens that a past holds, if there is one."""
    return 0 if past is None else len(past)
