"""A session: a text that is read once, kept in memory, and continued, rewound and forked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from plait.decode import token_ids
from plait.engine.context_store import ContextStore
from plait.engine.contexts import APE, ContextReport, read_contexts
from plait.engine.edits import (
    DEFAULT_REFRESH,
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
    with_the_end,
)
from plait.engine.request import Generation, Piece
from plait.engine.scoring import Score, nats_of_rows
from plait.errors import CapacityError, ConfigError, IncompatibleError
from plait.memory import Memory, Past, Rows
from plait.memory.arrangements import ParallelGroup

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

    def __init__(self, lm: LanguageModel, adapter: str = "") -> None:
        self.lm = lm
        self.adapter = lm.adapters.find(adapter)
        self.past = self._new_past()
        self.tokens: list[int] = []
        self.last: Generation | None = None
        self._closed = False
        # Ends the answer that is being made, which uses the past in place.
        self._stop_answer: Callable[[], object] | None = None
        # Whether keys and values are those of reading the tokens from the start.
        self._is_plain = True

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
        """Append token ids to what was read. They are fed to the model when something is generated.

        Raises:
            ConfigError: an id is outside the vocabulary; nothing was appended.
        """
        self._check_open()
        self.tokens.extend(token_ids(ids, self.lm.model.config.vocab_size))

    def rewind(self, length: int) -> None:
        """Go back to the first `length` tokens.

        Raises:
            ConfigError: there are not that many.
        """
        self._check_open()
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= len(self.tokens):
            raise ConfigError(
                f"rewind takes a length of whole tokens from 0 to {len(self.tokens)}. Got {length!r}."
            )
        self._go_back(length)
        del self.tokens[length:]

    def fork(self, count: int = 1) -> list[Session]:
        """New sessions with the same beginning; they share what is stored.

        Raises:
            ConfigError: `count` is below 1.
            CapacityError: what was read exceeds the model's context.
        """
        self._check_open()
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"fork takes a count of at least 1. Got {count!r}.")
        self._feed()
        return [self._twin() for _ in range(count)]

    def read_parallel(
        self,
        texts: Sequence[str],
        *,
        prefix: str = "",
        temperature: float = 0.9,
        scale: float = 0.9,
        store: ContextStore | None = None,
        allow_empty_prefix: bool = False,
    ) -> ContextReport:
        """Read texts apart from each other, all at the positions behind what was read, to be used together.

        None sees another, so that each is read once and kept for any later use, their order does not matter,
        and only the longest counts against the model's context. Read a question behind them next.
        `tokens` and `text` hold the longest, in the place that all share.
        Source: Yang, Chen, Chen 2025, arXiv:2502.05431 (APE).

        Args:
            texts: the contexts; empty ones are left out.
            prefix: read first, with everything that was read before it. It should be what starts a prompt,
                such as the head of a chat: without it every context attracts the weight that models park on
                first tokens.
            temperature: of attention within the contexts; 1 leaves it as it is. See `APE`, also to fit it.
            scale: on the contexts' share of attention; 1 leaves it as it is.
            store: where contexts are found and kept. It is used while the session holds plain text only:
                behind an edit or other contexts, keys and values depend on more than tokens.
            allow_empty_prefix: read contexts at the very beginning.

        Raises:
            ConfigError: nothing stands before the contexts, a setting is not above 0, or the policy of the memory
                would cut them.
            CapacityError: prefix and longest context fill the model's context.
            IncompatibleError: the model has recurrent layers, or its memory keeps notes.
        """
        self._check_open()
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ConfigError(f"read_parallel takes a list of texts. Got {texts!r}.")
        APE(temperature=temperature, scale=scale)
        encode = self.lm.tokenizer.encode
        before = [*self.tokens, *(encode(prefix, add_special=not self.tokens) if prefix else [])]
        contexts = [ids for text in texts if (ids := encode(text))]
        if contexts and not before and not allow_empty_prefix:
            raise ConfigError(
                "read_parallel needs something before the contexts. Give a prefix, such as the system message, or "
                "allow_empty_prefix=True."
            )
        longest: list[int] = max(contexts, key=len, default=[])
        limit = self.lm.model.config.max_positions
        if len(before) + len(longest) >= limit:
            raise CapacityError(
                f"The prefix of {len(before)} tokens and the longest context of {len(longest)} leave no room for a "
                f"question in the model's context of {limit}. Split that context."
            )
        past = self.past.fork()
        self.lm.new_engine().read(before, past)
        report = ContextReport(0, 0)
        if contexts:
            usable = store if self._is_plain else None
            found, report = read_contexts(self.lm, before, past, contexts, usable)
            for index, memory in enumerate(past.memories("read in parallel")):
                strands = [context.layers[index] for context in found]
                memory.append_strand(ParallelGroup(strands, temperature=temperature, scale=scale))
        self.past, self.tokens = past, [*before, *longest]
        self._is_plain = self._is_plain and not contexts
        return report

    def weigh_parallel(self, *, temperature: float, scale: float) -> None:
        """Change how the parallel contexts of this session are weighted; see `read_parallel`.

        Raises:
            ConfigError: a setting is not above 0.
        """
        self._check_open()
        APE(temperature=temperature, scale=scale)
        for memory in self.past.memories("weighted"):
            memory.strands = [
                strand.weighted(temperature=temperature, scale=scale)
                if isinstance(strand, ParallelGroup)
                else strand
                for strand in memory.strands
            ]

    def score(self, text: str) -> Score:
        """How well the model predicts a text that would come next; the session stays as it is.

        Raises:
            ConfigError: nothing was read, the text is empty, or parallel contexts were read last.
            CapacityError: the text would exceed the model's context.
        """
        self._check_open()
        ids = self.lm.tokenizer.encode(text)
        if not self.tokens or not ids:
            raise ConfigError("score takes a text of at least one token, behind at least one that was read.")
        limit = self.lm.plan.longest(self.lm.model.config.max_positions)
        if len(self.tokens) + len(ids) > limit:
            raise CapacityError(
                f"{len(self.tokens)} tokens were read and {len(ids)} would come; the model's context is "
                f"{limit}. Shorten the text."
            )
        self._feed()
        twin = self._twin()
        past = twin.ready()
        with torch.inference_mode():
            self.lm.new_engine().read(self.tokens[:-1], past)
            fed = torch.tensor([self.tokens[-1], *ids[:-1]], dtype=torch.int64)
            hidden = self.lm.model(fed, Rows([(len(fed), len(past))]), [past])
            nats = nats_of_rows(self.lm.model, hidden, torch.tensor(ids, dtype=torch.int64))
        return Score(float(nats.sum()), len(ids), len(text.encode()))

    @property
    def text(self) -> str:
        """What was read and generated so far, without special tokens."""
        return self.lm.tokenizer.decode(self.tokens)

    def edit(self, start: int, end: int, text: str, *, refresh: Refresh = DEFAULT_REFRESH) -> EditReport:
        """Replace characters [start, end) of `text`, reading only what changed; see `apply`."""
        return self.apply([Edit(start, end, text)], refresh=refresh)

    def edit_tokens(
        self,
        start: int,
        stop: int,
        ids: Sequence[int],
        *,
        refresh: Refresh = DEFAULT_REFRESH,
        materialise: bool = False,
    ) -> EditReport:
        """Replace tokens [start, stop) by others, reading only those; see `apply`."""
        self._check_open()
        edit = TokenEdit(start, stop, tuple(ids))
        vocab_size = self.lm.model.config.vocab_size
        edits = check_token_edits([edit], len(self.tokens), vocab_size)
        return self._apply(edits, refresh, materialise)

    def apply(
        self, edits: Sequence[Edit], *, refresh: Refresh = DEFAULT_REFRESH, materialise: bool = False
    ) -> EditReport:
        """Make several edits of `text` at once, all or none.

        Only new tokens, the few whose spelling an edit changes, and `refresh` tokens behind each edit are read; what
        stands further behind is moved. Moved tokens keep what they were computed from, so that answers are close to
        those after reading everything again, but not the same; `refresh` trades time for that. The last 16 tokens are
        always read again, with the next answer.
        Source: He et al. 2024, arXiv:2407.03157, which reads nothing behind an edit again (`refresh=0`).

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
        """As `generate`, yielding text as it comes; `last` holds the result. Closing cancels.

        Until the answer is complete, or the iterator is closed, nothing else may use the session. A text whose
        continuation is refused is not kept.
        """
        before = len(self.tokens)
        if text:
            self.read(text)
        yield from self._continue(before, **options)

    def chat(self, messages: str | Sequence[Message], **options: Any) -> Generator[Piece, None, None]:
        """Answer a conversation, reusing what its beginning shares with this session."""
        self.follow(self.lm.encode_chat(messages))
        yield from self._continue(len(self.tokens), **options)

    def follow(self, ids: Sequence[int]) -> int:
        """Make these ids what was read, keeping the memory of the longest common beginning.

        Returns:
            How many tokens did not have to be read again.
        """
        self._check_open()
        ids = token_ids(ids, self.lm.model.config.vocab_size)
        common = 0
        for ours, theirs in zip(self.tokens, ids, strict=False):
            if ours != theirs:
                break
            common += 1
        self.rewind(common)
        self.tokens.extend(ids[common:])
        return min(common, len(self.past))

    def ready(self) -> Past:
        """The past in front of the last token, for `Engine.submit` with `tokens` as the prompt.

        Afterwards the session goes on with `keep` of the answer.
        """
        self._check_open()
        # The last token is read again, because the answer begins with what the model says to it.
        self._go_back(max(len(self.tokens) - 1, 0))
        return self.past

    def keep(self, ids: Sequence[int]) -> None:
        """Append what was said to the past of `ready`: the answer, or its beginning; the rest is forgotten."""
        self._check_open()
        self.tokens.extend(ids)
        self._go_back(len(self.tokens))

    def nbytes(self) -> int:
        """Bytes allocated for what is remembered."""
        return self.past.nbytes()

    def close(self) -> None:
        """Free what is remembered, and end an answer that is being made. Using the session afterwards is an error."""
        self._closed = True
        if self._stop_answer is not None:
            self._stop_answer()
        self.tokens = []
        self.past = self._new_past()

    def _continue(self, before: int, **options: Any) -> Generator[Piece, None, None]:
        """Answer; back to the first `before` tokens where the request is refused."""
        try:
            engine, past = self.lm.new_engine(), self.ready()
            sequence = engine.submit(self.lm.request(list(self.tokens), **options), past)
        except BaseException:
            del self.tokens[before:]
            raise
        self._stop_answer = lambda: sequence.is_finished or engine.cancel(sequence)
        try:
            for _, piece in engine.run():
                yield piece
        finally:
            self._stop_answer()
            self._stop_answer = None
            if not self._closed:
                self.tokens = sequence.tokens
            self.last = sequence.result()

    def _apply(self, edits: list[TokenEdit], refresh: Refresh, materialise: bool) -> EditReport:
        groups = self._parallel_groups()
        edits = refreshed(
            self.lm.tokenizer, self.tokens, edits, refresh, [group.position for group in groups]
        )
        for group in groups:
            if any(edit.start < group.position + len(group) and edit.stop > group.position for edit in edits):
                raise ConfigError(
                    f"Tokens {group.position} to {group.position + len(group) - 1} are parallel contexts, which an "
                    "edit cannot change. Rewind to before them and read others."
                )
        behind = max((group.position + len(group) for group in groups), default=0)
        edits = with_the_end(self.tokens, edits, behind)
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
        self._is_plain = self._is_plain and not report.moved
        return report

    def _feed(self) -> None:
        """Read what has not been read, so that forks share it."""
        limit = self.lm.plan.longest(self.lm.model.config.max_positions)
        if len(self.tokens) > limit:
            raise CapacityError(
                f"The session has {len(self.tokens)} tokens; the model's context is {limit}. Rewind it."
            )
        self.lm.new_engine().read(self.tokens, self.past)

    def _go_back(self, length: int) -> None:
        """Remember at most the first `length` tokens; nothing, where the memory cannot go back that far."""
        if len(self.past) <= length:
            return
        try:
            self.past.truncate(length)
        except ConfigError:
            if any(group.position < length for group in self._parallel_groups()):
                # They are not in the tokens, so that they cannot be read anew.
                raise
            # A window has dropped what is needed again, or a state cannot forget: read it all anew.
            self.past = self._new_past()
            self._is_plain = True

    def _new_past(self) -> Past:
        return self.lm.model.new_past(self.lm.plan, self.adapter)

    def _twin(self) -> Session:
        twin = Session(self.lm)
        twin.adapter = self.adapter
        twin.tokens = list(self.tokens)
        twin.past = self.past.fork()
        twin._is_plain = self._is_plain
        return twin

    def _parallel_groups(self) -> list[ParallelGroup]:
        """The parallel contexts of the first layer; the others have the same positions."""
        first = self.past.layers[0]
        strands = first.strands if isinstance(first, Memory) else []
        return [strand for strand in strands if isinstance(strand, ParallelGroup)]

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("This session is closed. Open another with lm.session().")
        if self._stop_answer is not None:
            raise ConfigError(
                "This session is just answering. Take all pieces of the answer, or close its iterator, before using "
                "the session again; or fork the session first."
            )
