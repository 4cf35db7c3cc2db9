"""InfLLM: a sliding window, and a memory of older blocks in which every query looks up the best matching ones.

Paper: Xiao et al. 2024, arXiv:2402.04617, section 3; the score of a token is that of the authors' code.
Shapes: Q queries, H query heads, G key/value heads, T tokens, D head size, B blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import CapacityError, ConfigError
from plait.memory.grown import Asked, GrownRows, TokenScores
from plait.memory.memory import Memory
from plait.memory.plan import Choice, Notes, Seen, Visit
from plait.memory.policies.window import FirstAndLast
from plait.memory.rows import Segment
from plait.memory.spill import SpilledRows, SpilledStrands, SpillFile
from plait.memory.strand import FrozenStrand, Heads, HoldsTensors, Strand
from plait.ops import Causal, Everything, Far, Mask, capped

__all__ = ["InfLLM"]

# Rows of queries whose attention is computed at once when tokens are scored.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class InfLLM(FirstAndLast, name="infllm"):
    """See the last `local` positions, the first `initial` tokens, and the `topk` older blocks that match best.

    Everything is remembered, but a query attends to at most `local + initial + (topk + 1) * block` tokens
    and what came before it in its own run. All that is `local` or more back is seen as if it stood `local - 1` back,
    so no distance is larger than that. Equal to full attention while the sequence is no longer than `local`.

    A block leaves the window when all of it is `local` or more back, and is then stored by the codec. Its
    index is one vector for each query head: the mean of the `representatives` keys to which the window
    paid most attention. A run of up to `execution` queries, cut where positions are multiples of it, looks
    up once; so a prompt read in pieces of other sizes may see other blocks, and so may a draft, whose nodes
    look up together. Tokens taken back stay in the scores of those before them, if they were read with
    `execution` or more tokens behind them.

    Cost: beside keys and values, H D numbers in fp32 a block for the index; H numbers a token of the window; and one
    product of H D numbers a block and run. Layers whose own window is no wider than `local` keep that window and no blocks.

    Args:
        local: visible positions, the query's own included.
        initial: first tokens of the sequence that stay visible, as plain numbers whatever the codec is.
        block: tokens of a block; at most `local`.
        topk: blocks that a run of queries sees; 0 for none.
        representatives: keys of a block that make its index; at most `block`.
        execution: most queries that look up together; at most `local`.
        cached: blocks of a layer that stay in memory when the others are in a file; at least `topk`.
        cold: where other blocks and the index are: `memory`, or `file` for a memory-mapped temporary file.
    """

    local: Annotated[int, Field(ge=1)] = 4096
    initial: Annotated[int, Field(ge=0)] = 128
    block: Annotated[int, Field(ge=1)] = 128
    topk: Annotated[int, Field(ge=0)] = 16
    representatives: Annotated[int, Field(ge=1)] = 4
    execution: Annotated[int, Field(ge=1)] = 512
    cached: Annotated[int, Field(ge=0)] = 32
    cold: Literal["memory", "file"] = "memory"

    def check(self) -> None:
        for name, limit in (("block", "local"), ("execution", "local"), ("representatives", "block")):
            if getattr(self, name) > getattr(self, limit):
                raise ConfigError(
                    f"InfLLM.{name} must be at most {limit} {getattr(self, limit)}. Got {getattr(self, name)}."
                )
        if self.cached < self.topk:
            raise ConfigError(f"InfLLM.cached must be at least topk {self.topk}. Got {self.cached}.")

    @property
    def num_last(self) -> int:
        return self.local

    @property
    def num_first(self) -> int:
        # They are kept apart, with keys that are not rotated.
        return 0

    @property
    def max_distance(self) -> int:
        return self.local - 1

    @property
    def stores(self) -> bool:
        return True

    def new_notes(self) -> _Blocks:
        return _Blocks.in_file(self, SpillFile()) if self.cold == "file" else _Blocks(self)

    def runs(self, segment: Segment) -> list[range]:
        if type(segment.mask) is not Causal:
            return super().runs(segment)
        first, last = segment.position, segment.position + segment.length
        cuts = range(first - first % self.execution + self.execution, last, self.execution)
        bounds = [first, *cuts, last]
        return [range(a - first, b - first) for a, b in zip(bounds, bounds[1:], strict=False)]  # noqa: RUF007

    def visits(self, memory: Memory, segment: Segment) -> Sequence[Visit | Choice]:
        looks_back = self._looks_back(memory) and segment.length > 0
        if looks_back:
            self._remember(memory, segment.position)
        seen = self.visits_of_held(memory, segment)
        if not looks_back:
            return seen
        notes, window = _notes(memory), memory.window
        far = Far(segment.mask, self.local, segment.length)
        # What has left the window of the first query is far enough from all of them.
        whole = Everything() if window is None else far
        pinned = self.local - 1
        behind: list[Visit | Choice] = []
        if notes.first is not None:
            behind.append(Visit(notes.first, window, whole, turned_at=pinned))
        notes.choice = None
        if notes.blocks and self.topk:
            notes.choice = _Best(notes, self.topk, pinned, window, whole)
            behind.append(notes.choice)
        rest = (Visit(strand, window, far, turned_at=pinned) for strand in self._remainder(memory, segment))
        return [*behind, *rest, *seen]

    def visits_key(self, memory: Memory, segment: Segment) -> Hashable | None:
        if not self._looks_back(memory):
            return ()
        notes, position = _notes(memory), segment.position
        have = 0 if notes.first is None else len(notes.first)
        if len(notes.blocks) != self.num_blocks(position) or have != self.num_first_behind(position):
            return None
        start = self.start_of_rest(position)
        if notes.ahead is None or notes.ahead.start != start:
            return None
        # A mask hides what of the next block is in the window; none of it is missing.
        return notes.changes if position + segment.length - self.local <= start + self.block else None

    def observes(self, memory: Memory) -> bool:
        return self._looks_back(memory)

    def observe(self, memory: Memory, seen: Seen) -> None:
        if self._looks_back(memory):
            notes = _notes(memory)
            notes.pending.append(Asked(seen.queries, seen.lse, seen.positions))
            notes.num_asked += len(seen.positions)
            notes.keep_chosen()

    def rows_at_once(self, memory: Memory, least: int, most: int) -> int:
        if not self._looks_back(memory):
            return most
        # A row is read with the blocks that there are when its run begins; later ones are in another form.
        start = len(memory) - memory.pending
        have = self.num_blocks(start + least - 1)
        return next((n for n in range(least, most) if self.num_blocks(start + n) != have), most)

    def settle(self, memory: Memory) -> None:
        if not self._looks_back(memory):
            super().settle(memory)
            return
        notes = _notes(memory)
        self._remember(memory, len(memory))
        notes.learned = 0
        super().settle(memory)
        first = memory.strands[0] if memory.strands else memory.tail
        notes.mass.drop_before(first.position)

    def keep_from(self, memory: Memory, length: int) -> int:
        if not self._looks_back(memory):
            return super().keep_from(memory, length)
        asked = _notes(memory).asked
        start = self.start_of_rest(length)
        # What earlier queries paid attention to is read once more, when that is learned.
        return min(start, max(int(asked[0].positions.min()) - self.local + 1, 0)) if asked else start

    def check_truncate(self, memory: Memory, length: int) -> None:
        if not self._looks_back(memory):
            super().check_truncate(memory, length)
            return
        held = memory.all_strands()
        start = held[0].position if held else len(memory)
        if length and self.start_of_rest(length) < start:
            num_blocks = -(-max(start - self.initial, 0) // self.block)
            earliest = self.local + min(start, self.initial) + num_blocks * self.block
            raise ConfigError(
                f"Cannot go back to {length} tokens: {self} has put tokens up to {start - 1} into blocks, of which "
                f"the next one would see some in the window. Go back to at least {earliest}, or to 0."
            )

    def num_blocks(self, position: int) -> int:
        """Blocks that have left the window of a run of queries that starts at a position."""
        return max(position - self.local - self.initial, 0) // self.block

    def num_first_behind(self, position: int) -> int:
        """First tokens that have left the window of a run of queries that starts at a position."""
        return min(max(position - self.local, 0), self.initial)

    def _looks_back(self, memory: Memory) -> bool:
        """Whether a layer sees anything further back than `local`."""
        return memory.window is None or memory.window > self.local

    def start_of_rest(self, position: int) -> int:
        """The first token that is in no block, and not one of the first, for a run of queries at a position."""
        return self.num_first_behind(position) + self.num_blocks(position) * self.block

    def _remember(self, memory: Memory, position: int) -> None:
        """Bring scores and blocks to where a run of queries at a position finds them."""
        notes = _notes(memory)
        num_blocks, num_first = self.num_blocks(position), self.num_first_behind(position)
        # Scores are needed when a block is made. Layers take turns in learning them, so that no token waits for all.
        most = _ROWS_AT_ONCE // 2 + memory.layer % (_ROWS_AT_ONCE // 2)
        if len(notes.blocks) < num_blocks or notes.num_asked >= most:
            self._learn(memory)
        have = 0 if notes.first is None else len(notes.first)
        if have < num_first:
            new = [strand.turned_back() for strand in _held(memory, have, num_first)]
            notes.first = FrozenStrand.gathered([*([] if notes.first is None else [notes.first]), *new])
            notes.changes += 1
        for number in range(len(notes.blocks), num_blocks):
            start = self.initial + number * self.block
            block = self._ahead(memory, start)
            representative = self._representative(memory.heads, block, notes.mass.of(start, self.block))
            notes.add(memory.plan.codec.encode(block, memory.codec_notes), representative)

    def _ahead(self, memory: Memory, start: int) -> FrozenStrand:
        """The tokens of a block to be, from position `start` on."""
        notes = _notes(memory)
        if notes.ahead is None or notes.ahead.start != start:
            held = _held(memory, start, start + self.block)
            notes.ahead = FrozenStrand.gathered([strand.turned_back() for strand in held])
            notes.changes += 1
        return notes.ahead

    def _representative(self, heads: Heads, block: FrozenStrand, mass_HT: Tensor) -> Tensor:
        """The mean (H, D) of each head's keys to which most attention was paid."""
        group = heads.num_heads // heads.num_kv_heads
        best = mass_HT.topk(self.representatives, dim=1).indices
        keys_HTD = block.keys.float().repeat_interleave(group, dim=0)
        return keys_HTD.gather(1, best[..., None].expand(-1, -1, keys_HTD.shape[2])).mean(dim=1)

    def _learn(self, memory: Memory) -> None:
        """Add the attention that noted queries paid to each token of their windows to its score."""
        notes, heads = _notes(memory), memory.heads
        notes.mass.extend(heads.num_heads, len(memory))
        if not notes.num_asked:
            return
        everyone = Asked.joined([*notes.asked, *notes.pending])
        for start in range(0, len(everyone.positions), _ROWS_AT_ONCE):
            asked = everyone.some(slice(start, start + _ROWS_AT_ONCE))
            low = int(asked.positions.min()) - self.local + 1
            for strand in _held(memory, max(low, 0), int(asked.positions.max()) + 1):
                notes.mass.add(strand.position, self._paid(heads, asked, strand))
        if not notes.learned and notes.pending:
            notes.learned_from = int(notes.pending[0].positions[0])
        notes.learned += Asked.count(notes.pending)
        notes.asked, notes.pending, notes.num_asked = [], [], 0

    def _paid(self, heads: Heads, asked: Asked, strand: FrozenStrand) -> Tensor:
        """Attention (H, T) that queries paid, all together, to the tokens of a strand that are in their windows."""
        group = heads.num_heads // heads.num_kv_heads
        q_GMD = (asked.queries * heads.scale).unflatten(1, (heads.num_kv_heads, group))
        q_GMD = q_GMD.permute(1, 2, 0, 3).flatten(1, 2)
        scores = capped(q_GMD @ strand.keys.float().transpose(1, 2), heads.softcap)
        scores = scores.unflatten(1, (group, -1)).flatten(0, 1)  # (H, Q, T)
        places = torch.arange(strand.position, strand.position + len(strand))
        distance = asked.positions[:, None] - places
        if heads.bias is not None:
            scores = heads.bias.applied(scores, distance)
        shares = scores.sub_(asked.lse.T[..., None]).exp_()
        return shares.masked_fill_((distance < 0) | (distance >= self.local), 0.0).sum(dim=1)

    def _remainder(self, memory: Memory, segment: Segment) -> list[FrozenStrand]:
        """Tokens that are too far back for the window of some query and not in a block yet; the last may not be."""
        positions = segment.position + segment.mask.depths(segment.length)
        start, stop = self.start_of_rest(segment.position), int(positions.max()) - self.local + 1
        found = []
        if start < stop and start + self.block <= segment.position:
            # It is turned once for all queries that see some of it.
            found.append(self._ahead(memory, start))
            start += self.block
        if stop <= segment.position or memory.draft is None:
            return found + [strand.turned_back() for strand in _held(memory, start, stop)]
        # A draft deeper than the window: its nodes are not in the order of positions.
        nodes = memory.tail.split(segment.position - memory.tail.position)[1]
        past = [strand.turned_back() for strand in _held(memory, start, segment.position)]
        return [*found, *past, nodes.turned_back(positions)]


@dataclass
class _Blocks(Notes):
    """What lies behind the window of one layer; the keys of blocks are not rotated."""

    method: ClassVar[str] = "infllm"

    policy: InfLLM
    first: FrozenStrand | None = None
    blocks: list[Strand] | SpilledStrands = field(default_factory=list)
    index: GrownRows | SpilledRows = field(default_factory=GrownRows)
    # Where each block lies, for native code; as many as there are blocks where it can read them all.
    places: GrownRows | SpilledRows = field(default_factory=GrownRows)
    # The block to be, most of which is still in the window.
    ahead: FrozenStrand | None = None
    mass: TokenScores = field(default_factory=TokenScores)
    # Queries that have not been learned from, of rows that are part of the past and of pending ones, and how many.
    asked: list[Asked] = field(default_factory=list)
    pending: list[Asked] = field(default_factory=list)
    num_asked: int = 0
    # Pending rows whose attention is in `mass` already, and the position of the first of them.
    learned: int = 0
    learned_from: int = 0
    choice: _Best | None = None
    # Counted up whenever `first`, `blocks` or `ahead` are changed.
    changes: int = 0
    # What was read of a file last: whole strands, or their bytes where native code reads them.
    resident: OrderedDict[int, Strand | Tensor] = field(default_factory=OrderedDict)
    together: tuple[tuple[int, ...], list[Strand]] = ((), [])

    @classmethod
    def in_file(cls, policy: InfLLM, file: SpillFile) -> _Blocks:
        """With all that grows with the text in a file."""
        rows = [SpilledRows(file) for _ in range(2)]
        return cls(policy, blocks=SpilledStrands(file), index=rows[0], places=rows[1])

    @property
    def chosen(self) -> list[int]:
        """Numbers of the blocks that the last run of queries saw."""
        return [] if self.choice is None else self.choice.found.tolist()

    @property
    def retrieved(self) -> list[range]:
        """Positions of the tokens of each block that the last run of queries saw."""
        size = self.policy.block
        starts = (self.policy.initial + number * size for number in self.chosen)
        return [range(start, start + size) for start in starts]

    @property
    def cold_nbytes(self) -> int:
        """Bytes that blocks have in the file; blocks shared with a fork count in both."""
        return 0 if isinstance(self.blocks, list) else sum(block.nbytes for block in self.blocks[:])

    def add(self, block: Strand, representative: Tensor) -> None:
        """Put a block behind the others."""
        count = len(self.blocks)
        try:
            self.blocks.append(block)
            self.index.append(representative)
            place = self.blocks[count].place
            if place is not None:
                self.places.append(torch.tensor(place))
        except CapacityError:
            # The disk is full: as before.
            self._cut(count)
            raise
        self.changes += 1

    def retrieve(self, numbers: Sequence[int], *, joined: bool) -> list[Strand]:
        """Some blocks; joined, those of plain numbers are one strand, which stays until others are asked for."""
        if not joined:
            return [self._load(number) for number in numbers]
        key = tuple(numbers)
        if key != self.together[0]:
            strands = [self._load(number) for number in key]
            plain = [strand for strand in strands if type(strand) is FrozenStrand]
            coded = [strand for strand in strands if type(strand) is not FrozenStrand]
            # All stand at one distance, and all are seen, so that gaps between them do not matter.
            self.together = (key, [*([FrozenStrand.gathered(plain)] if plain else []), *coded])
        return self.together[1]

    def keep_chosen(self) -> None:
        """Count what native code has read of a file as resident, and let the rest go."""
        if isinstance(self.blocks, list):
            return
        for number in self.chosen:
            if number not in self.resident:
                self.resident[number] = self.blocks[number].mapped()
            self._touch(number)

    def _load(self, number: int) -> Strand:
        if isinstance(self.blocks, list):
            return self.blocks[number]
        found = self.resident.get(number)
        if not isinstance(found, Strand):
            self.resident[number] = found = self.blocks[number].load()
        self._touch(number)
        return found

    def _touch(self, number: int) -> None:
        self.resident.move_to_end(number)
        while len(self.resident) > self.policy.cached:
            self._leave(*self.resident.popitem(last=False))

    def _leave(self, number: int, held: Strand | Tensor) -> None:
        if isinstance(held, Tensor) and not isinstance(self.blocks, list):
            self.blocks[number].rest()

    def _cut(self, count: int) -> None:
        """Keep the first blocks only."""
        del self.blocks[count:]
        for grown in (self.index, self.places):
            grown.truncate(count)

    def fork(self) -> _Blocks:
        return _Blocks(
            self.policy,
            first=self.first,
            blocks=self.blocks.copy(),
            index=self.index.fork(),
            places=self.places.fork(),
            ahead=self.ahead,
            mass=self.mass.fork(),
            asked=list(self.asked),
            num_asked=self.num_asked,
            resident=self.resident.copy(),
            together=self.together,
        )

    def truncate(self, length: int) -> None:
        num_blocks, num_first = self.policy.num_blocks(length), self.policy.num_first_behind(length)
        if self.first is not None and num_first < len(self.first):
            self.first = self.first.split(num_first)[0] if num_first else None
        if self.ahead is not None and self.ahead.start + len(self.ahead) > length:
            self.ahead = None
        for number in [number for number in self.resident if number >= num_blocks]:
            self._leave(number, self.resident.pop(number))
        self._cut(num_blocks)
        self.mass.truncate(length)
        self.choice, self.together = None, ((), [])
        self.changes += 1
        self.learned = min(self.learned, max(length - self.learned_from, 0))
        self.asked, self.pending = Asked.before(self.asked, length), Asked.before(self.pending, length)
        self.num_asked = Asked.count([*self.asked, *self.pending])

    def commit(self, kept: Sequence[int], count: int) -> None:
        if self.pending:
            later = [row - self.learned for row in kept if row >= self.learned]
            rows = Asked.joined(self.pending)
            self.num_asked += len(later) - len(rows.positions)
            if later:
                self.asked.append(rows if len(later) == len(rows.positions) else rows.some(later))
        self.pending, self.learned = [], 0

    def tensors(self) -> list[Tensor]:
        strands = [strand for strand in (self.first, self.ahead) if strand is not None]
        inside = self.blocks if isinstance(self.blocks, list) else []
        read = self.resident.values()
        loaded = [block for block in read if isinstance(block, Strand)]
        held: list[HoldsTensors] = [*strands, *inside, *loaded, *self.together[1]]
        asked = [tensor for one in (*self.asked, *self.pending) for tensor in one]
        return [
            *self.index.tensors(),
            *self.places.tensors(),
            self.mass.storage,
            *asked,
            *(block for block in read if not isinstance(block, Strand)),
            *(tensor for strand in held for tensor in strand.tensors()),
        ]


class _Best(Choice):
    """The blocks that match best."""

    def __init__(self, notes: _Blocks, most: int, turned_at: int, window: int | None, mask: Mask) -> None:
        super().__init__(notes.index.numbers.flatten(1), most, turned_at, window, mask)
        self._notes = notes
        # Under a mask that looks at positions, blocks stand at their own.
        self._is_joined = window is None

    def strands(self, numbers: Sequence[int]) -> list[Strand]:
        return self._notes.retrieve(numbers, joined=self._is_joined)

    @property
    def places(self) -> Tensor | None:
        places = self._notes.places.numbers
        return places if len(places) == len(self.index) else None


def _notes(memory: Memory) -> _Blocks:
    notes = memory.policy_notes
    assert isinstance(notes, _Blocks)
    return notes


def _held(memory: Memory, start: int, stop: int) -> list[FrozenStrand]:
    """Tokens [start, stop) of those that are held as plain numbers."""
    found = []
    for strand in memory.all_strands():
        low, high = max(start - strand.position, 0), min(stop - strand.position, len(strand))
        if low < high and isinstance(strand, FrozenStrand):
            found.append(strand.split(high)[0].split(low)[1])
    return found
