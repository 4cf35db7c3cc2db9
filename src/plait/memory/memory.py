"""One layer's past of one sequence: strands, and the choices of how they are stored and seen.

Shapes: Q queries, H query heads, G key/value heads, D head size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError
from plait.memory.differentiable import DifferentiableStrand
from plait.memory.fold import attend
from plait.memory.plan import MemoryPlan, Notes, Seen, Watcher
from plait.memory.rows import Rows, Segment
from plait.memory.strand import DenseStrand, Heads, Strand, allocated_bytes
from plait.ops import Causal, Mask, Rope, Tree

__all__ = ["Memory", "check_precede"]

# Visiting a strand costs as much as reading some tens of its tokens, so shorter neighbours are joined.
_SHORT = 64


class Memory:
    """One layer's past: strands in the order of the sequence, the last of them a dense tail.

    New tokens are written to the tail. Rows written since the last `commit` are *pending*: they may
    be a draft tree of which `commit` keeps one path. What is remembered carries no gradient, unless the plan is
    `differentiable`.

    Args:
        heads: the layer's geometry.
        plan: codec, policy and device.
        window: the model's own sliding window in positions, or None.

    Attributes:
        layer: number of the layer within its model; a `Past` sets it.
        watcher: told the visits of each forward pass and the part that each gave; None in general.
        apart_from: position from which on tokens are to be handed on by themselves; see `set_apart`.

    Raises:
        ConfigError: the codec cannot store layers of this geometry.
        IncompatibleError: the policy cannot serve a layer of that geometry.
    """

    def __init__(self, heads: Heads, plan: MemoryPlan, window: int | None = None) -> None:
        plan.codec.check_heads(heads)
        plan.policy.check_layer(heads)
        self.heads = heads
        self.plan = plan
        self.window = window
        self.layer = 0
        self.watcher: Watcher | None = None
        self.apart_from = 0
        self.strands: list[Strand] = []
        self.tail = self._new_tail(0)
        self.pending = 0
        self.draft: Tree | None = None
        self.codec_notes = plan.codec.new_notes()
        self.policy_notes = plan.policy.new_notes()
        # Asked after every token, in every layer.
        self._keeps_as_written = plan.keeps_as_written and not self.notes

    def __len__(self) -> int:
        """Position of the next token, that is how many tokens have been seen."""
        return self.tail.position + len(self.tail)

    def held(self) -> list[Strand]:
        """Every strand that is kept allocated, oldest first; the tail is the last."""
        return [*self.strands, self.tail]

    def all_strands(self) -> list[Strand]:
        """Every strand that holds a token, oldest first."""
        return [strand for strand in self.held() if len(strand)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Remember keys and values, and answer the queries that came with them.

        Args:
            q: (Q, H, D), not rotated.
            k: (Q, G, D), not rotated.
            v: (Q, G, V).
            mask: what each row sees of this call's rows; causal when left out.

        Returns:
            (Q, H, V) fp32.

        Raises:
            ConfigError: shapes that are not those of the layer, or rows of a draft tree are pending.
        """
        rows = Rows([(q.shape[0], len(self), mask or Causal())], device=q.device)
        return attend([self], q, k, v, rows)

    def append(self, keys: Tensor, values: Tensor, draft: Tree | None = None) -> None:
        """Write rows behind the tail; they are pending until `commit`.

        Args:
            keys: (n, G, D), rotated in the tail's frame.
            values: (n, G, V).
            draft: the tree whose nodes the rows are; None for a run of tokens.

        Raises:
            ConfigError: a draft tree is, or would be, only a part of the pending rows.
        """
        self.check_append(draft)
        self.tail.append(keys, values)
        self._await(keys.shape[0], draft)

    def extend(self, count: int, draft: Tree | None = None) -> int:
        """Make room for rows behind the tail; they are pending, and the caller writes them there.

        Returns:
            The index, in the tail, of the first row to write. Raises as `append` does.
        """
        self.check_append(draft)
        first = self.tail.length
        self.tail.extend(count)
        self._await(count, draft)
        return first

    def _await(self, count: int, draft: Tree | None) -> None:
        self.pending += count
        self.draft = draft

    @property
    def notes(self) -> list[Notes]:
        """What codec and policy keep beside the strands."""
        return [notes for notes in (self.codec_notes, self.policy_notes) if notes is not None]

    def commit(self, path: Sequence[int] | Tensor | None = None, *, is_prompt: bool = False) -> None:
        """Make pending rows part of the past.

        Args:
            path: indices, among the pending rows, of those to keep: a run from the first row on, or
                the nodes of a draft tree from its root on. All of them when left out.
            is_prompt: more of the same prompt follows, so that a codec may wait to store it.

        Raises:
            ConfigError: the rows do not follow each other.
        """
        kept = self.check_commit(path)
        if path is None and self._keeps_as_written:
            self.pending, self.draft = 0, None
            return
        for notes in self.notes:
            notes.commit(kept, self.pending)
        if path is not None and kept != list(range(self.pending)):
            index = torch.tensor(kept, dtype=torch.int64, device=self.tail.keys.device)
            self.tail.keep(index, len(self.tail) - self.pending)
        self.pending, self.draft = 0, None
        self.plan.policy.gather(self)
        if not self.plan.policy.stores:
            self.plan.codec.seal(self, is_prompt=is_prompt)
        self.plan.policy.settle(self)

    def rows_at_once(self, least: int, most: int) -> int:
        """How many of `most` pending rows are committed together; see `Codec.rows_at_once`."""
        most = self.plan.policy.rows_at_once(self, least, most)
        return most if self.plan.policy.stores else self.plan.codec.rows_at_once(self, least, most)

    def truncate(self, length: int) -> None:
        """Forget every token at position `length` or later. Pending rows before it stay pending.

        Raises:
            ConfigError: `length` is negative or ahead of the sequence, cuts a draft tree, or tokens
                that would be seen from there were already dropped by the policy.
        """
        self.check_truncate(length)
        self.pending = max(0, self.pending - (len(self) - length))
        if not self.pending:
            self.draft = None
        self.apart_from = min(self.apart_from, length)
        for notes in self.notes:
            notes.truncate(length)
        if length >= self.tail.position:
            self.tail.truncate(length - self.tail.position)
            return
        kept = [strand for strand in self.strands if strand.position < length]
        last = kept[-1] if kept else None
        if last is not None and last.position + len(last) > length:
            kept[-1] = last.split(length - last.position)[0]
        self.strands = kept
        self.tail = self._new_tail(length)

    def freeze(self) -> None:
        """Make the tail a strand that other memories can share. Pending rows are committed.

        Later results equal those of before: bit for bit in a native program, elsewhere up to rounding, because
        the past is cut differently. Strands of a few tokens are joined, so that a memory that is forked at every
        token does not become a chain.

        Raises:
            ConfigError: a draft tree is pending.
        """
        self.commit()
        if len(self.tail):
            self.strands.append(self.tail.frozen())
            self.tail = self._new_tail(len(self))
            self._join_short()
            self.plan.policy.settle(self)

    def fork(self) -> Memory:
        """A second memory with the same past. Both share what is stored; each writes to a tail of its own.

        The tail of this memory becomes a shared strand; see `freeze`.

        Raises:
            ConfigError: a draft tree is pending.
        """
        self.freeze()
        twin = Memory(self.heads, self.plan, self.window)
        twin.layer, twin.apart_from = self.layer, self.apart_from
        twin.strands = list(self.strands)
        twin.tail = self._new_tail(len(self))
        twin.codec_notes = self.codec_notes and self.codec_notes.fork()
        twin.policy_notes = self.policy_notes and self.policy_notes.fork()
        return twin

    def set_apart(self) -> None:
        """Let what comes next be stored apart from what is held, so that `pieces` can hand it on by itself.

        A codec that drops tokens would otherwise make one strand of both, which cannot be cut.

        Raises:
            ConfigError: a draft tree is pending.
        """
        self.freeze()
        self.apart_from = len(self)

    def run(self, start: int, stop: int) -> list[Strand]:
        """The strands of tokens [start, stop), which other memories may then begin with (`adopt`).

        What is remembered stays the same. Borders between strands are put at `start` and `stop`; later results
        equal those without them, bit for bit in a native program and elsewhere up to rounding.

        Raises:
            ConfigError: rows are pending, or there are no such tokens.
        """
        if self.pending or not 0 <= start <= stop <= len(self):
            raise ConfigError(
                f"run takes committed tokens, from 0 to {len(self)}. "
                f"Got {start} to {stop} with {self.pending} rows pending."
            )
        self._cut(start)
        self._cut(stop)
        return [strand for strand in self.strands if start <= strand.position < stop]

    def adopt(self, strands: Sequence[Strand]) -> None:
        """Let shared strands stand for the first tokens, in place of what is held of them.

        They must hold the same tokens, from the first of the sequence on; a memory that is shorter
        continues behind them. Nothing is copied.

        Raises:
            ConfigError: rows are pending, and the strands reach into the tail.
        """
        length = sum(map(len, strands))
        if self.pending and length > self.tail.position:
            raise ConfigError(f"Call commit before adopt: {self.pending} rows are pending.")
        if length >= len(self) and not self.pending:
            self.strands, self.tail = [*self._before(), *strands], self._new_tail(length)
            return
        self._cut(length)
        self.strands = [*self._before(), *strands, *(own for own in self.strands if own.position >= length)]

    def precede(self, strand: Strand) -> None:
        """Let every token see a strand that stands before the first one, at positions below 0.

        It is no part of the sequence: it is not counted, cut, dropped or handed on with tokens.

        Raises:
            ConfigError: the memory holds something, or the strand does not end at position 0.
            IncompatibleError: codec or policy do not keep every token as it is.
        """
        if len(self) or self.strands or strand.position + len(strand) != 0:
            raise ConfigError(
                "precede takes a strand that ends at position 0, and a memory that holds nothing."
            )
        check_precede(self.plan)
        self.strands.append(strand)

    def _before(self) -> list[Strand]:
        """What stands before the first token."""
        return [strand for strand in self.strands if strand.position < 0]

    def growth(self, count: int) -> int:
        """Bytes that `count` more rows would allocate, before codec and policy store or drop any."""
        return self.tail.growth(count)

    def pieces(self, start: int, stop: int) -> list[Strand]:
        """Strands that hold exactly the tokens at positions [start, stop), and share storage with this memory.

        Raises:
            ConfigError: not all of those tokens are held, or a strand cannot be cut there.
        """
        found: list[Strand] = []
        reached = start
        for strand in self.strands:
            low = max(start - strand.position, 0)
            high = min(stop - strand.position, len(strand))
            if low >= high or strand.position + low != reached:
                continue
            reached = strand.position + high
            for at in (high, low):
                if 0 < at < len(strand):
                    strand.check_split(at)
                    parts = strand.split(at)
                    strand = parts[0] if at == high else parts[1]
            found.append(strand)
        if reached != stop:
            raise ConfigError(
                f"Tokens {start} to {stop - 1} are wanted, but token {reached} is not held: {self.plan} has "
                "dropped it, or it was never read. Read the text again from there."
            )
        return found

    def splice(self, source: Memory, start: int, stop: int, *, materialise: bool = False) -> None:
        """Append tokens that another memory of this layer remembers, at the positions behind the last one.

        No key is touched: the strands are shared, and their frames start elsewhere, so that queries are
        rotated accordingly when they visit. Values, and the layers above the first, stay as they were
        computed in the old place.
        Source: He et al. 2024, arXiv:2407.03157, whose form turns the stored keys instead (`materialise`).

        Args:
            source: what the tokens are taken from. Its tail becomes a shared strand; see `freeze`.
            start, stop: positions of the tokens in `source`.
            materialise: turn plain keys to the frame of this sequence, once, so that queries need no
                rotation of their own for them. Costs a copy of the keys; keys in fewer bits than 32 are
                rounded again. Strands that cannot be turned are moved as without it.

        Raises:
            ConfigError: `source` does not hold those tokens.
            IncompatibleError: the speed of rotation depends on the sequence's length, or codec or policy
                keep notes that cannot be moved.
        """
        self.check_splice(source, start, stop)
        source.freeze()
        self.freeze()
        position = len(self)
        moved = [piece.moved(position - start) for piece in source.pieces(start, stop)]
        if materialise:
            moved = [piece.reframed(0) for piece in moved]
        for notes, theirs in zip(self.notes, source.notes, strict=True):
            notes.splice(theirs, start, stop, position)
        self._stand_behind(moved)

    def append_strand(self, strand: Strand) -> None:
        """Put a strand behind the last token, at the positions at which it stands.

        Raises:
            ConfigError: it does not start where the sequence ends, or the policy would cut a strand that cannot
                be cut; the memory is of no use then.
            IncompatibleError: codec or policy keep notes that say nothing of its tokens.
        """
        if strand.position != len(self):
            raise ConfigError(
                f"append_strand takes a strand that starts at position {len(self)}. Got one at {strand.position}."
            )
        for notes in self.notes:
            notes.check_splice()
        self.freeze()
        self._stand_behind([strand])
        self.plan.policy.visits(self, Segment(0, 1, len(self), Causal()))

    def _stand_behind(self, strands: list[Strand]) -> None:
        """Put strands that stand behind the last token to the others. The tail must be empty."""
        self.strands += strands
        self.tail = self._new_tail(max((s.position + len(s) for s in strands), default=len(self)))
        self._join_short()
        self.plan.policy.settle(self)

    def check_splice(self, source: Memory, start: int, stop: int) -> None:
        """Raise what `splice` would raise. Both tails become shared strands; see `freeze`."""
        if not 0 <= start <= stop <= len(source):
            raise ConfigError(f"splice takes tokens from 0 to {len(source)}. Got {start} to {stop}.")
        source.freeze()
        self.freeze()
        source.pieces(start, stop)
        reach = max(len(source), len(self) + stop - start)
        rope = self.heads.rope
        if rope is not None and len(self) != start and not _turns_alike(rope, reach):
            raise IncompatibleError(
                "The rotary scaling of this model turns keys by speeds that depend on the length of the sequence, "
                f"so that tokens of a sequence of {reach} cannot be moved. Read the text again instead."
            )
        for notes in self.notes:
            notes.check_splice()

    def check_append(self, draft: Tree | None) -> None:
        """Raise what `append` would raise for rows that are, or are not, a draft tree."""
        if self.pending and (self.draft is not None or draft is not None):
            raise ConfigError(
                "A draft tree must be the only pending rows. "
                f"Call commit before writing next to the {self.pending} rows that are pending."
            )

    def check_commit(self, path: Sequence[int] | Tensor | None = None) -> Sequence[int]:
        """The pending rows that `commit(path)` would keep, or the error that it would raise."""
        if path is None and self.draft is None:
            return range(self.pending)
        kept = list(range(self.pending)) if path is None else [int(row) for row in path]
        parents = range(-1, self.pending - 1) if self.draft is None else self.draft.parents
        for before, row in pairwise([-1, *kept]):
            if not 0 <= row < self.pending or parents[row] != before:
                rows = "rows from the first on" if self.draft is None else "nodes from the root on"
                raise ConfigError(
                    f"commit takes indices of the {self.pending} pending rows that follow each other: {rows}. "
                    f"Got {kept}."
                )
        return kept

    def check_truncate(self, length: int) -> None:
        """Raise the error that `truncate(length)` would raise."""
        if not 0 <= length <= len(self):
            raise ConfigError(f"truncate takes a length from 0 to {len(self)}. Got {length}.")
        committed = len(self) - self.pending
        if self.draft is not None and committed < length < len(self):
            raise ConfigError(
                f"Cannot cut a draft tree at {length} tokens. Call commit with a path, or truncate to {committed}."
            )
        for strand in self.strands:
            if 0 < length - strand.position < len(strand):
                strand.check_split(length - strand.position)
        self.plan.policy.check_truncate(self, length)

    @property
    def is_observed(self) -> bool:
        """Whether codec or policy wants to learn from the queries of the next forward pass."""
        return self.plan.codec.observes(self) or self.plan.policy.observes(self)

    def observe(self, seen: Seen) -> None:
        """Tell codec and policy what the queries of a forward pass found."""
        self.plan.codec.observe(self, seen)
        self.plan.policy.observe(self, seen)

    def nbytes(self) -> int:
        """Bytes allocated for keys, values and whatever codec and policy keep beside them."""
        return allocated_bytes([*self.held(), *self.notes])

    def _cut(self, at: int) -> None:
        """Put a border between strands at position `at`."""
        tail = self.tail
        if at > tail.position:
            front, rest = tail.split(at - tail.position)
            # The two go on in storage of their own, so that each can be freed without the other.
            self.strands.append(front.copied().frozen() if len(rest) else tail.frozen())
            self.tail = rest.copied() if len(rest) else self._new_tail(at)
            return
        for index, strand in enumerate(self.strands):
            if strand.position < at < strand.position + len(strand):
                self.strands[index : index + 1] = strand.split(at - strand.position)
                return

    def _join_short(self) -> None:
        """Join neighbours that are both short, unless somebody has noted where strands begin and end."""
        if self.notes:
            return
        kept: list[Strand] = []
        for strand in self.strands:
            last = kept[-1] if kept else None
            if last is not None and last.position >= 0 and max(len(last), len(strand)) < _SHORT:
                both = last.joined(strand)
                if both is not None:
                    kept[-1] = both
                    continue
            kept.append(strand)
        self.strands = kept

    def _new_tail(self, position: int) -> DenseStrand:
        kind = DifferentiableStrand if self.plan.differentiable else DenseStrand
        return kind(self.heads, start=position, dtype=self.plan.codec.tail_dtype, device=self.plan.device)


def check_precede(plan: MemoryPlan) -> None:
    """Raise where memories of a plan cannot have a strand before the first token; see `Memory.precede`.

    Raises:
        IncompatibleError: its codec or policy do not keep every token as it is.
    """
    if not plan.is_shareable:
        raise IncompatibleError(
            f"{plan} does not keep every token as it is, and might hide or change what an adapter puts before every "
            "text. Choose memory='full', or another kind of adapter."
        )


def _turns_alike(rope: Rope, length: int) -> bool:
    """Whether sequences of every length up to this one turn keys by the same speeds."""
    first, last = rope.for_length(1), rope.for_length(length)
    return first.amplitude == last.amplitude and torch.equal(first.frequencies, last.frequencies)
