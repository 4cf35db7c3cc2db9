"""The engine: many requests, one packed forward pass a step, no padding."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plait.decode import Sampler
from plait.decode.speculate import Context, Speculator, Tree, verify
from plait.engine.request import Piece, Request
from plait.engine.sequence import RunningSequence
from plait.errors import CapacityError, ConfigError
from plait.memory import Causal, Mask, MemoryPlan, Past, Rows
from plait.memory import Tree as TreeMask
from plait.nn import Transformer
from plait.text import Tokenizer

__all__ = ["Engine"]


class Feed(NamedTuple):
    """The rows that one sequence contributes to a step.

    `tree` is None for a piece of the prompt behind which more of the prompt follows: nothing is
    chosen. Else its nodes are the last rows; the rows before them are prompt.
    """

    sequence: RunningSequence
    tokens: list[int]
    tree: Tree | None


class Engine:
    """Continues many sequences at once.

    Every step is one forward pass over packed rows: one row, or a small draft tree, for each sequence
    that is generating, and as much of the waiting prompts as `rows_per_step` allows.

    Args:
        model: the transformer.
        tokenizer: for the text of answers.
        plan: how each sequence's past is kept.
        new_speculator: makes the speculator of a new sequence.
        rows_per_step: most rows of one forward pass.
        max_sequences: most sequences that generate at the same time; others wait in order of arrival.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        plan: MemoryPlan,
        *,
        new_speculator: Callable[[], Speculator],
        rows_per_step: int = 512,
        max_sequences: int = 64,
    ) -> None:
        if rows_per_step < 1 or max_sequences < 1:
            raise ConfigError(
                f"Engine needs rows_per_step and max_sequences of at least 1. Got {rows_per_step} and {max_sequences}."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.new_speculator = new_speculator
        self.rows_per_step = rows_per_step
        self.max_sequences = max_sequences
        self._waiting: deque[RunningSequence] = deque()
        self._running: list[RunningSequence] = []
        self._speculators: dict[RunningSequence, Speculator] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self._waiting and not self._running

    def submit(self, request: Request, past: Past | None = None) -> RunningSequence:
        """Queue a request.

        Args:
            request: what to continue.
            past: what is remembered of the first tokens of the prompt; it is used in place, and at
                least the last token of the prompt is read again.

        Raises:
            ConfigError: a prompt id or a biased id is outside the vocabulary.
            CapacityError: the prompt fills the model's context.
        """
        vocab_size, limit = self.model.config.vocab_size, self.model.config.max_positions
        outside = next((token for token in request.prompt if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise ConfigError(f"Token ids must be in [0, {vocab_size}). Got {outside}.")
        if len(request.prompt) >= limit:
            raise CapacityError(
                f"The prompt has {len(request.prompt)} tokens; the model's context is {limit}, the answer included. "
                "Shorten the prompt."
            )
        if past is None:
            past = self.model.new_past(self.plan)
        elif len(past) >= len(request.prompt):
            past.truncate(len(request.prompt) - 1)
        sampler = Sampler(request.sampling, vocab_size)
        sequence = RunningSequence(request, past, self.tokenizer, sampler, limit)
        self._waiting.append(sequence)
        return sequence

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], past: Past) -> None:
        """Feed the tokens that a past does not hold yet, without choosing anything."""
        while len(past) < len(tokens):
            piece = torch.tensor(tokens[len(past) : len(past) + self.rows_per_step], dtype=torch.int64)
            with _restored_on_failure([past]):
                self.model(piece, Rows([(len(piece), len(past))]), [past])
            past.commit(is_prompt=len(past) < len(tokens))

    def cancel(self, sequence: RunningSequence) -> Piece:
        """End a sequence now; what it remembered is freed unless the caller holds it."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._retire(sequence)
        return sequence.cancel()

    def run(self) -> Iterator[tuple[RunningSequence, Piece]]:
        """Step until every request is finished, yielding what each step added."""
        while not self.is_idle:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[tuple[RunningSequence, Piece]]:
        """One forward pass: read, choose, and return what was added to each sequence.

        A sequence whose logits or past fail is cancelled alone, and its error raised after the others
        have been served.
        """
        feeds = self._schedule()
        if not feeds:
            return []
        with _restored_on_failure([feed.sequence.past for feed in feeds]):
            logits = self._forward(feeds)
        pieces: list[tuple[RunningSequence, Piece]] = []
        failure: Exception | None = None
        start = 0
        for feed in feeds:
            stop = start + (len(feed.tree) if feed.tree is not None else 0)
            try:
                piece = self._settle(feed, logits[start:stop])
            except Exception as error:  # noqa: BLE001 - one bad sequence must not stop the others
                piece, failure = self.cancel(feed.sequence), error
            start = stop
            if piece is not None:
                pieces.append((feed.sequence, piece))
                if feed.sequence.is_finished:
                    self._retire(feed.sequence)
        if failure is not None:
            raise failure
        return pieces

    def _schedule(self) -> list[Feed]:
        """Rows for this step: generating sequences first, then prompts in order of arrival."""
        while self._waiting and len(self._running) < self.max_sequences:
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            self._speculators[sequence] = self.new_speculator()
        feeds: list[Feed] = []
        room = self.rows_per_step
        # Whoever has the fewest rows to read goes first; Python's sort keeps the order of arrival.
        for sequence in sorted(self._running, key=lambda s: len(s.unread) > 1):
            if room == 0:
                break
            unread = sequence.unread
            if len(unread) > room:
                feeds.append(Feed(sequence, unread[:room], None))
            else:
                tree = self._propose(sequence, room - len(unread))
                feeds.append(Feed(sequence, unread[:-1] + tree.tokens, tree))
            room -= len(feeds[-1].tokens)
        return feeds

    def _propose(self, sequence: RunningSequence, room: int) -> Tree:
        remaining = sequence.request.max_new_tokens - len(sequence.choices)
        context = Context(sequence.tokens, budget=min(room, remaining - 1), positions=sequence.max_positions)
        tree = self._speculators[sequence].propose(context)
        tree.check(context, self.model.config.vocab_size)
        return tree

    def _forward(self, feeds: Sequence[Feed]) -> Tensor:
        """Logits of the rows at which something is chosen: every node of every tree."""
        segments: list[tuple[int, int, Mask]] = []
        wanted: list[int] = []
        start = 0
        for feed in feeds:
            count = len(feed.tokens)
            segments.append((count, len(feed.sequence.past), _mask(feed)))
            if feed.tree is not None:
                wanted.extend(range(start + count - len(feed.tree), start + count))
            start += count
        tokens = torch.tensor([token for feed in feeds for token in feed.tokens], dtype=torch.int64)
        pasts = [feed.sequence.past for feed in feeds]
        return self.model.answer(
            tokens, Rows(segments), pasts, wanted=torch.tensor(wanted, dtype=torch.int64)
        )

    def _settle(self, feed: Feed, logits: Tensor) -> Piece | None:
        sequence = feed.sequence
        if feed.tree is None:
            sequence.past.commit(is_prompt=True)
            return None
        path, choices = verify(feed.tree, logits, sequence.sampler, sequence.history)
        prompt_rows = len(feed.tokens) - len(feed.tree)
        kept = [*range(prompt_rows), *(prompt_rows + node for node in path)]
        sequence.past.commit(None if len(kept) == len(feed.tokens) else kept)
        piece = sequence.accept(choices)
        if len(sequence.past) >= len(sequence.tokens):
            # A stop inside the accepted path left rows of tokens that are not part of the answer.
            sequence.past.truncate(len(sequence.tokens) - 1)
        self._speculators[sequence].observe(sequence.tokens, feed.tree, path, logits)
        return piece

    def _retire(self, sequence: RunningSequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        self._speculators.pop(sequence, None)


def _mask(feed: Feed) -> Mask:
    """Causal for a run of tokens; the tree's own structure where it branches."""
    if feed.tree is None or feed.tree.is_chain:
        return Causal()
    lead = len(feed.tokens) - len(feed.tree)
    parents = [node - 1 for node in range(lead)]
    parents += [lead - 1 if parent == -1 else lead + parent for parent in feed.tree.parents]
    return TreeMask(parents)


@contextlib.contextmanager
def _restored_on_failure(pasts: Sequence[Past]) -> Iterator[None]:
    """Forget the rows of a forward pass that did not finish, also after Ctrl-C."""
    lengths = [len(past) for past in pasts]
    try:
        yield
    except BaseException:
        for past, length in zip(pasts, lengths, strict=True):
            past.truncate(length)
        raise
