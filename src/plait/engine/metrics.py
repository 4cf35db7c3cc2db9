"""Numbers that say what an engine does."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Metrics"]


class Metrics(NamedTuple):
    """What an engine does now, and what it has done since it was made.

    Attributes:
        waiting, running: requests without and with a place.
        memory_bytes: keys, values and states that are kept, shared strands once.
        prefix_bytes: how many of them are strands that sequences share or may share.
        steps: forward passes.
        rows: tokens and draft nodes that were fed.
        starts: times that a sequence began to read, a second time after it gave its past back included.
        hits: how many of these began with something that was remembered already.
        tokens: tokens of all sequences when they began to read.
        shared_tokens: how many of these did not have to be read.
        preemptions: times that a sequence gave its past back.
        proposed: tokens that were guessed.
        accepted: how many of these became part of an answer.
    """

    waiting: int = 0
    running: int = 0
    memory_bytes: int = 0
    prefix_bytes: int = 0
    steps: int = 0
    rows: int = 0
    starts: int = 0
    hits: int = 0
    tokens: int = 0
    shared_tokens: int = 0
    preemptions: int = 0
    proposed: int = 0
    accepted: int = 0

    def after_step(self, rows: int) -> Metrics:
        """The numbers after a forward pass of some rows."""
        return self._replace(steps=self.steps + 1, rows=self.rows + rows)

    def after_start(self, tokens: int, shared: int) -> Metrics:
        """The numbers after a sequence began to read."""
        return self._replace(
            starts=self.starts + 1,
            hits=self.hits + (shared > 0),
            tokens=self.tokens + tokens,
            shared_tokens=self.shared_tokens + shared,
        )

    def after_draft(self, proposed: int, accepted: int) -> Metrics:
        """The numbers after a draft was judged."""
        return self._replace(proposed=self.proposed + proposed, accepted=self.accepted + accepted)

    def after_preemption(self) -> Metrics:
        """The numbers after a sequence gave its past back."""
        return self._replace(preemptions=self.preemptions + 1)
