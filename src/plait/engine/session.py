"""A session: a text that is read once, kept in memory, and continued, rewound and forked."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Self

from plait.engine.edits import (
    Edit,
    EditReport,
    Refresh,
    TokenEdit,
    check_token_edits,
    count_edits,
    edited,
    edited_past,
    refreshed,
    token_edits,
)
from plait.engine.request import Generation, Piece
from plait.errors import CapacityError, ConfigError, IncompatibleError

if TYPE_CHECKING:
    from plait.engine.language_model import LanguageModel, Message

__all__ = ["Session"]


class Session:
    """What one conversation or document has been read so far, ready to go on.

    Reading the same beginning again costs nothing: only what follows the longest common run of tokens
    is fed to the model.

    Example:
        >>> with lm.session() as s:  # doctest: +SKIP
        ...     s.read(report)
        ...     first, second = s.fork(2)
        ...     print(first.generate("Summary:").text)
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.past = lm.model.new_past(lm.plan)
        self.tokens: list[int] = []
        self.last: Generation | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Tokens read and generated so far."""
        return len(self.tokens)

    def read(self, text: str) -> None:
        """Append text to what was read, without generating."""
        self.read_tokens(self.lm.tokenizer.encode(text, add_special=not self.tokens))

    def read_tokens(self, ids: Sequence[int]) -> None:
        """Append token ids to what was read. They are fed to the model when something is generated."""
        self._check_open()
        self.tokens.extend(ids)

    def rewind(self, length: int) -> None:
        """Go back to the first `length` tokens.

        Raises:
            ConfigError: there are not that many.
        """
        self._check_open()
        if not 0 <= length <= len(self.tokens):
            raise ConfigError(f"rewind takes a length from 0 to {len(self.tokens)}. Got {length}.")
        del self.tokens[length:]
        self._go_back(length)

    def fork(self, count: int = 1) -> list[Session]:
        """New sessions with the same beginning; they share what is stored.

        Raises:
            ConfigError: `count` is below 1.
        """
        self._check_open()
        if count < 1:
            raise ConfigError(f"fork takes a count of at least 1. Got {count}.")
        self._feed()
        return [self._twin() for _ in range(count)]

    @property
    def text(self) -> str:
        """What was read and generated so far, without special tokens."""
        return self.lm.tokenizer.decode(self.tokens)

    def edit(self, start: int, end: int, text: str, *, refresh: Refresh = 0) -> EditReport:
        """Replace characters [start, end) of `text`, reading only what changed; see `apply`."""
        return self.apply([Edit(start, end, text)], refresh=refresh)

    def edit_tokens(
        self, start: int, stop: int, ids: Sequence[int], *, refresh: Refresh = 0, materialise: bool = False
    ) -> EditReport:
        """Replace tokens [start, stop) by others, reading only those; see `apply`."""
        self._check_open()
        edit = TokenEdit(start, stop, tuple(ids))
        vocab_size = self.lm.model.config.vocab_size
        edits = check_token_edits([edit], len(self.tokens), vocab_size)
        return self._apply(edits, refresh, materialise)

    def apply(self, edits: Sequence[Edit], *, refresh: Refresh = 0, materialise: bool = False) -> EditReport:
        """Make several edits of `text` at once, all or none.

        Only new tokens, and the few whose spelling an edit changes, are read; what stands behind an edit is
        moved. Moved tokens keep what they were computed from, so that answers are close to those after
        reading everything again, but not the same; `refresh` trades time for that. The token after
        which an answer begins is always read again.
        Source: He et al. 2024, arXiv:2407.03157.

        Args:
            edits: in characters of `text` as it is before any of them.
            refresh: tokens behind each edit that are read again, or `"line"` for the rest of its line.
            materialise: turn the moved keys once, rather than the queries at every step; see
                `plait.memory.Memory.splice`.

        Raises:
            ConfigError: an edit outside the text, two that overlap, one across a special token, or one before
                what the memory has dropped.
            CapacityError: the text would exceed the model's context.
            IncompatibleError: the model has learned positions or recurrent layers, or its memory keeps notes that
                cannot move.
        """
        self._check_open()
        return self._apply(token_edits(self.lm.tokenizer, self.tokens, edits), refresh, materialise)

    def generate(self, text: str = "", **options: Any) -> Generation:
        """Read a text, then continue; the continuation becomes part of the session."""
        for _ in self.stream(text, **options):
            pass
        assert self.last is not None
        return self.last

    def stream(self, text: str = "", **options: Any) -> Generator[Piece, None, None]:
        """As `generate`, yielding text as it comes; `last` holds the result. Closing cancels."""
        if text:
            self.read(text)
        yield from self._continue(**options)

    def chat(self, messages: str | Sequence[Message], **options: Any) -> Generator[Piece, None, None]:
        """Answer a conversation, reusing what its beginning shares with this session."""
        self.follow(self.lm.encode_chat(messages))
        yield from self._continue(**options)

    def follow(self, ids: Sequence[int]) -> int:
        """Make these ids what was read, keeping the memory of the longest common beginning.

        Returns:
            How many tokens did not have to be read again.
        """
        self._check_open()
        common = 0
        for ours, theirs in zip(self.tokens, ids, strict=False):
            if ours != theirs:
                break
            common += 1
        self.rewind(common)
        self.tokens.extend(ids[common:])
        return min(common, len(self.past))

    def nbytes(self) -> int:
        """Bytes allocated for what is remembered."""
        return self.past.nbytes()

    def close(self) -> None:
        """Free what is remembered. Using the session afterwards is an error."""
        self._closed = True
        self.tokens = []
        self.past = self.lm.model.new_past(self.lm.plan)

    def _continue(self, **options: Any) -> Generator[Piece, None, None]:
        self._check_open()
        # The last token is read again, because the answer begins with what the model says to it.
        self._go_back(max(len(self.tokens) - 1, 0))
        engine = self.lm.new_engine()
        sequence = engine.submit(self.lm.request(list(self.tokens), **options), self.past)
        try:
            for _, piece in engine.run():
                yield piece
        finally:
            if not sequence.is_finished:
                engine.cancel(sequence)
            self.tokens = sequence.tokens
            self.last = sequence.result()

    def _apply(self, edits: list[TokenEdit], refresh: Refresh, materialise: bool) -> EditReport:
        edits = refreshed(self.lm.tokenizer, self.tokens, edits, refresh)
        report = count_edits(edits, len(self.tokens), len(self.past))
        if not edits:
            return report
        tokens = edited(self.tokens, edits)
        config = self.lm.model.config
        if len(tokens) >= config.max_positions:
            raise CapacityError(
                f"The edited text has {len(tokens)} tokens; the model's context is {config.max_positions}, the answer "
                "included. Shorten the text."
            )
        if report.moved and config.learned_positions:
            raise IncompatibleError(
                f"{self.lm.name} has learned positions, which are part of every token, so that tokens cannot be moved. "
                "Read the edited text in a new session."
            )
        # A fork is edited and takes the place of the past at the end, so that a failure changes nothing.
        engine = self.lm.new_engine()
        self.past = edited_past(engine, self.past, self.tokens, edits, materialise=materialise)
        self.tokens = tokens
        return report

    def _feed(self) -> None:
        """Read what has not been read, so that forks share it."""
        self.lm.new_engine().read(self.tokens, self.past)

    def _go_back(self, length: int) -> None:
        """Remember at most the first `length` tokens; nothing, where the memory cannot go back that far."""
        if len(self.past) <= length:
            return
        try:
            self.past.truncate(length)
        except ConfigError:
            # A window has dropped what is needed again, or a state cannot forget: read it all anew.
            self.past = self.lm.model.new_past(self.lm.plan)

    def _twin(self) -> Session:
        twin = Session(self.lm)
        twin.tokens = list(self.tokens)
        twin.past = self.past.fork()
        return twin

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("This session is closed. Open another with lm.session().")
