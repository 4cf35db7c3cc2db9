"""Editing what a session has read: only what changed is read again, the rest is moved.

Positional integrity encoding (PIE): He et al. 2024, arXiv:2407.03157. Keys behind an edit are not turned
here: their strands get another frame (see `plait.memory.Memory.splice`), which gives the same scores.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from plait.decode import token_ids
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.engine.engine import Engine
    from plait.memory import Past
    from plait.text import Tokenizer

__all__ = [
    "Edit",
    "EditReport",
    "DEFAULT_REFRESH",
    "Refresh",
    "TokenEdit",
    "check_token_edits",
    "count_edits",
    "edited",
    "edited_past",
    "refreshed",
    "token_edits",
    "with_the_end",
]

# Tokens around an edit that are tokenised again at first, and how many of them must come out as they
# were before the rest is taken to be unchanged.
_AROUND, _AGREEING = 16, 4

# Tokens at the end that are read again after every edit. What comes next depends on them most: with only the
# very last one read again, a new name is often not found that is found with four.
_LAST = 16
# Tokens behind an edit that are read again when nobody says how many: they depend on it most.
DEFAULT_REFRESH = 32

Refresh = int | Literal["line"]
E = TypeVar("E", "Edit", "TokenEdit")


class Edit(NamedTuple):
    """Characters [start, end) of a session's text replaced by `text`."""

    start: int
    end: int
    text: str


class TokenEdit(NamedTuple):
    """Tokens [start, stop) of a session replaced by `ids`."""

    start: int
    stop: int
    ids: tuple[int, ...]


class EditReport(NamedTuple):
    """What became of the tokens of an edited session; they sum to its length.

    Attributes:
        encoded: tokens that are read by the model, at once or with the next answer.
        moved: tokens that were kept and now stand elsewhere.
        reused: tokens that were kept where they were.
    """

    encoded: int
    moved: int
    reused: int


def token_edits(tokenizer: Tokenizer, tokens: Sequence[int], edits: Sequence[Edit]) -> list[TokenEdit]:
    """Edits of a text as edits of its tokens, in order; edits that change nothing are left out.

    A tokenizer merges across the borders of an edit, so a few tokens on both sides are tokenised again,
    and more of them until the new ids agree with the old ones. Special tokens are never tokenised again.

    Args:
        tokens: ids of the text.
        edits: in characters of `tokenizer.decode(tokens)`.

    Raises:
        ConfigError: an edit outside the text, two that overlap, one across a special token, or tokens whose
            bytes are not text.
    """
    for edit in edits:
        if not isinstance(edit, Edit) or not isinstance(edit.text, str):
            raise ConfigError(f"An edit is Edit(start, end, text), with a text. Got {edit!r}.")
    text = _Text(tokenizer, tokens)
    pending = [
        Edit(edit.start, edit.end, edit.text) for edit in _in_order(edits, len(text.characters), "characters")
    ]
    found: list[tuple[Edit, range, TokenEdit]] = []
    while pending:
        edit = pending.pop(0)
        run, change = text.change(edit)
        # What lies between two edits must be long enough to be sure that it is tokenised as before.
        if found and found[-1][1] == run and change.start - found[-1][2].stop < _AGREEING:
            before = found.pop()[0]
            between = text.characters[before.end : edit.start]
            pending.insert(0, Edit(before.start, edit.end, before.text + between + edit.text))
        else:
            found.append((edit, run, change))
    return [change for _, _, change in found if change.ids or change.start < change.stop]


def check_token_edits(edits: Sequence[TokenEdit], length: int, vocab_size: int) -> list[TokenEdit]:
    """The edits in order.

    Raises:
        ConfigError: one is outside the tokens, two overlap, or an id is outside the vocabulary.
    """
    checked = [TokenEdit(start, stop, tuple(token_ids(ids, vocab_size))) for start, stop, ids in edits]
    return _in_order(checked, length, "tokens")


def refreshed(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    edits: Sequence[TokenEdit],
    refresh: Refresh,
    borders: Sequence[int] = (),
) -> list[TokenEdit]:
    """The edits, each made longer by tokens behind it that shall be read again with the new text in view.

    Args:
        refresh: how many, or `"line"` for those up to the end of the line.
        borders: tokens that are not read again; an edit in front of one ends there at the latest.
    """
    if refresh != "line" and (isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 0):
        raise ConfigError(f"refresh takes a number of tokens from 0 on, or 'line'. Got {refresh!r}.")
    longer = []
    for edit, end in zip(edits, _ends(edits, len(tokens)), strict=True):
        limit = min([end, *(border for border in borders if border >= edit.stop)])
        if refresh == "line":
            newline = (at for at in range(edit.stop, limit) if b"\n" in tokenizer.token_bytes(tokens[at]))
            stop = next(newline, limit - 1) + 1
        else:
            stop = min(edit.stop + refresh, limit)
        longer.append(TokenEdit(edit.start, stop, (*edit.ids, *tokens[edit.stop : stop])))
    return longer


def with_the_end(tokens: Sequence[int], edits: Sequence[TokenEdit], first: int = 0) -> list[TokenEdit]:
    """The edits, and the last few tokens replaced by themselves, so that they are read again.

    Args:
        first: no token before this one is read again.
    """
    if not edits:
        return []
    start = max(edits[-1].stop, len(tokens) - _LAST, first)
    return (
        [*edits, TokenEdit(start, len(tokens), tuple(tokens[start:]))] if start < len(tokens) else list(edits)
    )


def edited(tokens: Sequence[int], edits: Sequence[TokenEdit]) -> list[int]:
    """The tokens after edits that are in order."""
    result: list[int] = []
    stop = 0
    for edit in edits:
        result += [*tokens[stop : edit.start], *edit.ids]
        stop = edit.stop
    return [*result, *tokens[stop:]]


def count_edits(edits: Sequence[TokenEdit], length: int, held: int) -> EditReport:
    """What edits that are in order do to tokens of which the first `held` are remembered."""
    moved, reused, by = 0, min(edits[0].start if edits else length, held), 0
    for edit, stop in zip(edits, _ends(edits, length), strict=True):
        by += len(edit.ids) - (edit.stop - edit.start)
        kept = max(min(stop, held) - edit.stop, 0)
        moved, reused = (moved + kept, reused) if by else (moved, reused + kept)
    return EditReport(length + by - moved - reused, moved, reused)


def edited_past(
    engine: Engine,
    past: Past,
    tokens: Sequence[int],
    edits: Sequence[TokenEdit],
    *,
    materialise: bool = False,
) -> Past:
    """A past of the tokens after edits that are in order.

    New tokens are read with what stands before them in view, the moved tokens between two edits included.
    Tokens behind the last one that `past` holds are not read.

    Args:
        past: of `tokens`, or of the first of them; what it remembers does not change.
        materialise: see `plait.memory.Memory.splice`.
    """
    held = len(past)
    new = past.fork()
    new.truncate(min(edits[0].start, held))
    written = list(tokens[: edits[0].start])
    for edit, following in zip(edits, _ends(edits, held), strict=True):
        if edit.stop >= held:
            break
        written += edit.ids
        kept = tokens[edit.stop : min(following, held)]
        if kept:
            engine.read(written, new)
            new.splice(past, edit.stop, edit.stop + len(kept), materialise=materialise)
            written += kept
    return new


def _ends(edits: Sequence[TokenEdit], end: int) -> list[int]:
    """Where what is kept behind each edit ends."""
    return [*(edit.start for edit in edits[1:]), end] if edits else []


class _Text:
    """Tokens, their bytes, and the characters that these spell."""

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
        self.tokenizer, self.tokens = tokenizer, tokens
        pieces = [tokenizer.token_bytes(token) for token in tokens]
        self.data = b"".join(pieces)
        self.starts = [0, *accumulate(len(piece) for piece in pieces)]
        # As `decode` does: the space that the tokenizer puts before a text is not part of it.
        self.hidden = int(tokenizer.strips_leading_space and self.data.startswith(b" "))
        self.characters = _decoded(self.data[self.hidden :])

    def change(self, edit: Edit) -> tuple[range, TokenEdit]:
        """The tokens that an edit changes, and the run of ordinary tokens in which they lie."""
        low = self.hidden + len(self.characters[: edit.start].encode())
        high = low + len(self.characters[edit.start : edit.end].encode())
        run = self._run(low, high, edit)
        around = ahead = _AROUND
        while True:
            begin = self._opening(self._index(low, run) - around, run, -1)
            # The first token that starts at or behind the end of the edit.
            last = min(max(bisect_left(self.starts, high), run.start), run.stop)
            end = self._opening(last + ahead, run, 1)
            window = (
                self.data[self.starts[begin] : low] + edit.text.encode() + self.data[high : self.starts[end]]
            )
            if self.tokenizer.strips_leading_space:
                # The tokenizer puts it back.
                window = window.removeprefix(b" ")
            old, new = self.tokens[begin:end], self.tokenizer.encode(_decoded(window))
            front = _common(old, new)
            behind = old[max(last - begin, front) :]
            back = _common(list(reversed(behind)), list(reversed(new[front:])))
            is_sure_before = begin == run.start or front >= _AGREEING
            is_sure_behind = end == run.stop or back >= _AGREEING
            if is_sure_before and is_sure_behind:
                return run, TokenEdit(begin + front, end - back, tuple(new[front : len(new) - back]))
            around *= 1 if is_sure_before else 4
            ahead *= 1 if is_sure_behind else 4

    def _index(self, byte: int, run: range) -> int:
        """The token that holds a byte, or the end of the run."""
        return min(max(bisect_right(self.starts, byte) - 1, run.start), run.stop)

    def _opening(self, index: int, run: range, step: int) -> int:
        """The nearest place in a direction where a word begins, or the end of the run."""
        while run.start < index < run.stop and self.data[self.starts[index] : self.starts[index] + 1] != b" ":
            index += step
        return min(max(index, run.start), run.stop)

    def _run(self, low: int, high: int, edit: Edit) -> range:
        """The run of ordinary tokens that holds these bytes."""
        special = [-1, *(at for at, token in enumerate(self.tokens) if token in self.tokenizer.special_ids)]
        runs = [
            range(before + 1, after)
            for before, after in zip(special, [*special[1:], len(self.tokens)], strict=True)
            if before + 1 < after
        ]
        for run in runs:
            if self.starts[run.start] <= low and high <= self.starts[run.stop]:
                return run
        if low == high:
            return range(len(self.tokens), len(self.tokens))
        raise ConfigError(
            f"Characters {edit.start} to {edit.end} hold a special token, which an edit in characters cannot "
            "replace. Edit the text on each side of it, or use edit_tokens."
        )


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(
            "The tokens of this session do not spell a text, so that no character has a place. Use edit_tokens."
        ) from None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _in_order(edits: Sequence[E], length: int, unit: str) -> list[E]:
    for edit in edits:
        if any(isinstance(end, bool) or not isinstance(end, int) for end in edit[:2]):
            raise ConfigError(f"An edit takes whole numbers of {unit}. Got {edit[0]!r} to {edit[1]!r}.")
    ordered = sorted(edits, key=lambda edit: (edit[0], edit[1]))
    reached = 0
    for edit in ordered:
        start, stop = edit[0], edit[1]
        if not 0 <= start <= stop <= length:
            raise ConfigError(
                f"An edit takes {unit} from 0 to {length}, the start first. Got {start} to {stop}."
            )
        if start < reached:
            raise ConfigError(
                f"Edits must not overlap. One ends at {reached} of the {unit} and another starts at {start}."
            )
        reached = stop
    return ordered
