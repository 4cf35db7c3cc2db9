"""The exact law of the next byte: a sum over the token sequences that cover the bytes so far.

Source: Phan et al. 2024, "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and
Model Ensembles", arXiv:2410.09303, section 3. P(x) is the sum of P(t) over the *cover* of the bytes x: the
valid token sequences t whose bytes begin with x and whose last token holds the last byte of x. A sequence is
valid if it is what the tokenizer makes of its bytes; the model's law is restricted to tokens that keep it so.
The marginal form sums over every sequence instead (Vieira et al. 2024, arXiv:2412.03719), in a beam.

Byte laws have 257 entries: the bytes, and the end of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from plait.decode.bytes.reader import common_length
from plait.errors import ConfigError

__all__ = ["END", "ByteState", "ByteTokens", "LawReader", "Marginal"]

END = 256
Ids = tuple[int, ...]
_Law = npt.NDArray[np.float64]
_Tokens = npt.NDArray[np.int64]


class ByteTokens(Protocol):
    """What has to be known of a tokenizer; see `plait.text.ByteVocabulary`."""

    @property
    def lead(self) -> bytes:
        """Bytes before every text."""

    @property
    def longest(self) -> int:
        """Bytes of the longest token."""

    @property
    def lengths(self) -> _Tokens:
        """Bytes of each token, (V,); 0 for one that stands for no text."""

    @property
    def end_ids(self) -> AbstractSet[int]:
        """Tokens that end a text."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encodings(self, data: bytes) -> list[Ids]:
        """The valid sequences whose bytes are `data`, at least one."""

    def successors(self, ids: Sequence[int], data: bytes) -> npt.NDArray[np.bool_]:
        """Which tokens keep a valid sequence valid, (V,)."""

    def may_end(self, ids: Sequence[int], data: bytes) -> bool:
        """Whether a text may end after a valid sequence."""

    def starting_with(self, prefix: bytes) -> _Tokens:
        """Tokens whose bytes start with a prefix."""

    def bytes_at(self, tokens: _Tokens, place: int) -> npt.NDArray[np.uint8]:
        """One byte of each token."""


class LawReader(Protocol):
    """A model of tokens; see `plait.decode.bytes.TokenReader`."""

    def read(self, main: Ids, wanted: Iterable[Ids]) -> Iterator[tuple[Ids, _Law]]:
        """The log-law of the next token after each wanted sequence."""

    def fork(self) -> Self:
        """A second reader."""


Reader = TypeVar("Reader", bound=LawReader)


@dataclass(frozen=True)
class Marginal:
    """Sum over all token sequences, not only the valid ones, in a beam.

    Args:
        beam: groups of sequences that are kept, at least 1; the likeliest.
    """

    beam: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.beam, bool) or not isinstance(self.beam, int) or self.beam < 1:
            raise ConfigError(f"Marginal.beam must be a whole number of at least 1. Got {self.beam!r}.")


class _Group(NamedTuple):
    """Members of the cover that are one sequence and different last tokens.

    Attributes:
        parent: the sequence before the last token, without what starts a text.
        tokens: the last tokens.
        place: bytes of the last token that the text has already; less than any of them has.
        logs: log-probability of each member, in nats from where the state began.
    """

    parent: Ids
    tokens: _Tokens
    place: int
    logs: _Law


class ByteState(Generic[Reader]):
    """The cover of the bytes so far, and the law of the next one.

    Args:
        tokens: the tokenizer.
        reader: the model; it belongs to the state from here on.
        start: tokens that start every text, at least one.
        data: the bytes so far.
        marginal: sum over all sequences of the last word; None for the valid ones alone.
        base: how many of the first tokens `log_total` takes as given; those that the whole cover shares
            when left out.

    Attributes:
        data: the bytes so far.
        pruned: largest share of the probability that a step of a beam left out.
        invalid: largest probability that the model gave to tokens that its tokenizer would not put there.

    Raises:
        ConfigError: the bytes are not text to the tokenizer, or impossible.
        CapacityError: they fill the model's context.
    """

    def __init__(
        self,
        tokens: ByteTokens,
        reader: Reader,
        start: Sequence[int],
        data: bytes = b"",
        *,
        marginal: Marginal | None = None,
        base: int | None = None,
    ) -> None:
        if not start:
            raise ConfigError(
                "The first byte has no law without a token before it. Give start at least one token."
            )
        self._tokens = tokens
        self.reader = reader
        self._start = tuple(start)
        self._marginal = marginal
        self._ends: dict[Ids, float] = {}
        self._groups: list[_Group] = []
        self._law: _Law | None = None
        self._end_logs: dict[Ids, float] = {}
        self.data = data
        self.pruned = 0.0
        self.invalid = 0.0
        if marginal is None:
            self._begin(tokens.lead + data, base)
        else:
            self._begin_beam(tokens.lead + data)

    def law(self) -> _Law:
        """Log-probability of each next byte and of the end, (257,) float64 in nats; they sum to 1."""
        if self._law is None:
            self._extend()
            logs = [group.logs for group in self._groups]
            peak = max(
                float(each.max()) for each in [*logs, np.array(list(self._end_logs.values()) or [-np.inf])]
            )
            mass = np.zeros(257)
            for group in self._groups:
                places = self._tokens.bytes_at(group.tokens, group.place)
                mass += np.bincount(places, weights=np.exp(group.logs - peak), minlength=257)
            mass[END] = sum(np.exp(log - peak) for log in self._end_logs.values())
            with np.errstate(divide="ignore"):
                self._law = np.log(mass) - np.log(mass.sum())
        return self._law

    def push(self, byte: int) -> None:
        """Append a byte.

        Raises:
            ConfigError: it is no byte, or impossible here; the state stays as it was.
        """
        if isinstance(byte, bool) or not isinstance(byte, (int, np.integer)) or not 0 <= byte < 256:
            raise ConfigError(f"push takes a byte, a whole number in [0, 256). Got {byte!r}.")
        if self.law()[byte] == -np.inf:
            raise ConfigError(
                f"Byte {int(byte):#04x} cannot follow {self.data[-16:]!r}: no token sequence of this model has it there."
            )
        ends: dict[Ids, float] = {}
        groups = []
        for group in self._groups:
            here = self._tokens.bytes_at(group.tokens, group.place) == byte
            tokens, logs = group.tokens[here], group.logs[here]
            whole = self._tokens.lengths[tokens] == group.place + 1
            for token, log in zip(tokens[whole].tolist(), logs[whole].tolist(), strict=True):
                if log > -np.inf:
                    known = ends.get((*group.parent, token), -np.inf)
                    ends[*group.parent, token] = float(np.logaddexp(known, log))
            if not whole.all():
                groups.append(_Group(group.parent, tokens[~whole], group.place + 1, logs[~whole]))
        self._ends, self._groups, self._law = ends, groups, None
        self.data += bytes([byte])
        if self._marginal is not None:
            self._prune(self._marginal.beam)

    def log_total(self) -> float:
        """Log-probability of the bytes so far, in nats, given the first tokens (see `base`)."""
        logs = [*self._ends.values(), *(_log_sum(group.logs) for group in self._open_groups())]
        return _log_sum(np.array(logs))

    def settled(self) -> tuple[Ids, float]:
        """The likeliest sequence that ends with the last byte, with the tokens that start a text, and its
        share of the probability; a share of 0 where there is none."""
        if not self._ends:
            return self._start, 0.0
        best = max(self._ends, key=lambda ids: self._ends[ids])
        return (*self._start, *best), float(np.exp(self._ends[best] - self.log_total()))

    def log_of(self, data: bytes) -> float:
        """Log-probability that `data` comes next, in nats, from the cover of all of it: a pass over its tokens."""
        if not data:
            return 0.0
        if self._marginal is not None:
            twin, total = self.fork(), 0.0
            for byte in data:
                total += float(twin.law()[byte])
                twin.push(byte)
            return total
        base = self._shared()
        whole = ByteState(self._tokens, self.reader.fork(), self._start, self.data + data, base=base)
        here = ByteState(self._tokens, self.reader.fork(), self._start, self.data, base=base)
        return whole.log_total() - here.log_total()

    def fork(self) -> ByteState[Reader]:
        """A second state at the same bytes; pushing to one does not change the other."""
        twin: ByteState[Reader] = ByteState.__new__(ByteState)
        twin.__dict__.update(self.__dict__)
        twin.reader = self.reader.fork()
        twin._ends, twin._groups = dict(self._ends), list(self._groups)
        return twin

    def _shared(self) -> int:
        """Tokens that all members of the cover begin with."""
        members = [*self._ends, *(group.parent for group in self._open_groups())]
        return common_length(members)

    def _open_groups(self) -> list[_Group]:
        """Groups of members that go on behind the last byte; those of sequences that end there apart."""
        return [group for group in self._groups if group.place]

    def _begin(self, data: bytes, base: int | None) -> None:
        """The cover of some bytes from scratch, all its sequences read in one pass."""
        ends = self._tokens.encodings(data)
        texts = dict.fromkeys(ends, data)
        open_tokens: list[tuple[Ids, _Tokens, int]] = []
        for place in range(1, min(self._tokens.longest, len(data) + 1)):
            candidates = self._tokens.starting_with(data[-place:])
            candidates = candidates[self._tokens.lengths[candidates] > place]
            if not len(candidates):
                continue
            before = data[:-place]
            for ids in self._tokens.encodings(before):
                kept = candidates[self._tokens.successors(ids, before)[candidates]]
                if len(kept):
                    texts[ids] = before
                    open_tokens.append((ids, kept, place))
        if base is None:
            base = common_length(list(texts))
        # Log-probability of each sequence from `base` on, and what follows it, by reading the tree of them all.
        inside = {ids[:count] for ids in texts for count in range(base, len(ids))}
        leaves = {ids for ids, _, _ in open_tokens}
        steps: dict[Ids, dict[int, float]] = {}
        follows: dict[Ids, _Law] = {}
        needed: dict[Ids, set[int]] = {}
        for ids in texts:
            for count in range(base, len(ids)):
                needed.setdefault(ids[:count], set()).add(ids[count])
        wanted = [(*self._start, *ids) for ids in inside | leaves]
        for name, raw in self.reader.read((*self._start, *max(ends, key=len)), wanted):
            ids = name[len(self._start) :]
            size = int(self._tokens.lengths[list(ids)].sum()) if ids else 0
            law = self._valid_law(ids, data[:size], raw)[0]
            steps[ids] = {token: float(law[token]) for token in needed.get(ids, ())}
            if ids in leaves:
                follows[ids] = law
        logs = {ids: float(sum(steps[ids[:i]][ids[i]] for i in range(base, len(ids)))) for ids in texts}
        self._ends = {ids: logs[ids] for ids in ends if logs[ids] > -np.inf}
        self._groups = [
            _Group(ids, kept, place, logs[ids] + follows[ids][kept]) for ids, kept, place in open_tokens
        ]
        if not self._ends and not self._groups:
            raise ConfigError(f"No token sequence of this model has the bytes {data[-16:]!r} at the end.")

    def _begin_beam(self, data: bytes) -> None:
        """A beam from the last space on; the text before it is taken in its own encoding."""
        place = len(data)
        while place > 0 and data[place - 1 : place].isspace():
            place -= 1
        while place > 0 and not data[place - 1 : place].isspace():
            place -= 1
        place = max(place - 1, 0) if place else 0
        while place > 0 and data[place] & 0xC0 == 0x80:
            place -= 1
        before, rest = data[:place], data[place:]
        self._ends = {self._tokens.encodings(before)[0]: 0.0}
        written, self.data = self.data, before
        for byte in rest:
            self.push(byte)
        self.data = written

    def _extend(self) -> None:
        """Add what may follow each sequence that ends with the last byte."""
        self._end_logs = {}
        if not self._ends:
            return
        data = self._tokens.lead + self.data if self._marginal is None else b""
        names = {(*self._start, *ids): ids for ids in self._ends}
        main = max(names, key=lambda name: self._ends[names[name]])
        for name, raw in self.reader.read(main, names):
            ids = names[name]
            law, tokens, end = self._valid_law(ids, data, raw)
            self._groups.append(_Group(ids, tokens, 0, self._ends[ids] + law[tokens]))
            if end > -np.inf:
                self._end_logs[ids] = self._ends[ids] + end

    def _valid_law(self, ids: Ids, data: bytes, raw: _Law) -> tuple[_Law, _Tokens, float]:
        """The model's log-law over what may follow; the tokens that may, and the log-probability of the end."""
        if self._marginal is None:
            mask = self._tokens.successors(ids, data)
            may_end = self._tokens.may_end(ids, data)
        else:
            mask, may_end = self._tokens.lengths > 0, True
        # A model may have more rows than its tokenizer has tokens.
        raw = raw[: self._tokens.vocab_size]
        tokens = np.flatnonzero(mask)
        ends = sorted(self._tokens.end_ids) if may_end else []
        end = _log_sum(raw[ends]) if ends else -np.inf
        total = float(np.logaddexp(_log_sum(raw[tokens]), end))
        self.invalid = max(self.invalid, -float(np.expm1(min(total, 0.0))))
        return raw - total, tokens, end - total

    def _prune(self, beam: int) -> None:
        """Keep the likeliest sequences and groups."""
        shares = [*self._ends.values(), *(_log_sum(group.logs) for group in self._groups)]
        if len(shares) <= beam:
            return
        order = np.argsort(-np.array(shares), kind="stable")
        kept = set(order[:beam].tolist())
        total = _log_sum(np.array(shares))
        lost = 1 - float(np.exp(_log_sum(np.array(shares)[order[:beam]]) - total))
        self.pruned = max(self.pruned, lost)
        count = len(self._ends)
        self._groups = [group for index, group in enumerate(self._groups, start=count) if index in kept]
        self._ends = {ids: log for index, (ids, log) in enumerate(self._ends.items()) if index in kept}


def _log_sum(logs: _Law) -> float:
    peak = float(logs.max(initial=-np.inf))
    return peak if peak == -np.inf else peak + float(np.log(np.exp(logs - peak).sum()))
