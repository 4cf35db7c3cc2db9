"""InfLLM: a sliding window, and a memory of older blocks in which every query looks up the best matching ones.

Paper: Xiao et al. 2024, arXiv:2402.04617, section 3; the score of a token is that of the authors' code.
Shapes: Q queries, H query heads, G key/value heads, T tokens, D head size, B blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.memory.memory import Memory
from plait.memory.plan import Notes, Seen, Visit
from plait.memory.policies.window import FirstAndLast
from plait.memory.rows import Segment
from plait.memory.spill import Spilled, SpillFile
from plait.memory.strand import FrozenStrand, Heads, HoldsTensors, Strand
from plait.ops import Causal, Everything, Far

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
        cold: where other blocks are: `memory`, or `file` for a memory-mapped temporary file.
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
        return _Blocks(self, SpillFile() if self.cold == "file" else None)

    def runs(self, segment: Segment) -> list[range]:
        if type(segment.mask) is not Causal:
            return super().runs(segment)
        first, last = segment.position, segment.position + segment.length
        cuts = range(first - first % self.execution + self.execution, last, self.execution)
        bounds = [first, *cuts, last]
        return [range(a - first, b - first) for a, b in zip(bounds, bounds[1:], strict=False)]  # noqa: RUF007

    def look_up(self, memory: Memory, segment: Segment, queries: Callable[[int], Tensor]) -> None:
        notes = _notes(memory)
        notes.chosen = []
        if not self._looks_back(memory):
            return
        self._remember(memory, segment.position)
        num_blocks = self.num_blocks(segment.position)
        if num_blocks <= self.topk:
            notes.chosen = list(range(num_blocks))
        elif segment.length and self.topk:
            mean_HD = queries(self.local - 1).float().mean(dim=0)
            scores = notes.index.numbers[:num_blocks].flatten(1) @ mean_HD.flatten()
            notes.chosen = sorted(scores.topk(self.topk).indices.tolist())

    def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
        seen = super().visits(memory, segment)
        if not self._looks_back(memory) or not segment.length:
            return seen
        notes, window = _notes(memory), memory.window
        far = Far(segment.mask, self.local, segment.length)
        # What has left the window of the first query is far enough from all of them.
        whole = Everything() if window is None else far
        behind = [*([] if notes.first is None else [notes.first]), *notes.retrieve(joined=window is None)]
        pinned = self.local - 1
        return [
            *(Visit(strand, window, whole, turned_at=pinned) for strand in behind),
            *(Visit(strand, window, far, turned_at=pinned) for strand in self._remainder(memory, segment)),
            *seen,
        ]

    def observe(self, memory: Memory, seen: Seen) -> None:
        if self._looks_back(memory):
            depths = seen.segment.mask.depths(seen.segment.length)
            _notes(memory).asked.append(
                _Asked(
                    seen.queries(memory.tail.offset).detach(),
                    seen.merged.lse.detach(),
                    seen.segment.position + depths,
                )
            )

    def rows_at_once(self, memory: Memory, least: int, most: int) -> int:
        if not self._looks_back(memory):
            return most
        # A row is read with the blocks that there are when its run begins; later ones are in another form.
        start = len(memory) - memory.pending
        have = self.num_blocks(start + least - 1)
        return next((n for n in range(least, most) if self.num_blocks(start + n) != have), most)

    def settle(self, memory: Memory) -> None:
        if self._looks_back(memory):
            notes = _notes(memory)
            self._remember(memory, len(memory))
            notes.learned = 0
        super().settle(memory)
        held = memory.all_strands()
        if self._looks_back(memory):
            notes.mass.drop_before(held[0].position if held else len(memory))

    def keep_from(self, memory: Memory, length: int) -> int:
        if not self._looks_back(memory):
            return super().keep_from(memory, length)
        return self.num_first_behind(length) + self.num_blocks(length) * self.block

    def check_truncate(self, memory: Memory, length: int) -> None:
        if not self._looks_back(memory):
            super().check_truncate(memory, length)
            return
        held = memory.all_strands()
        start = held[0].position if held else len(memory)
        if length and self.keep_from(memory, length) < start:
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

    def _remember(self, memory: Memory, position: int) -> None:
        """Bring scores and blocks to where a run of queries at a position finds them."""
        notes = _notes(memory)
        self._learn(memory)
        have = 0 if notes.first is None else len(notes.first)
        if have < self.num_first_behind(position):
            new = [strand.turned_back() for strand in _held(memory, have, self.num_first_behind(position))]
            notes.first = FrozenStrand.gathered([*([] if notes.first is None else [notes.first]), *new])
        for number in range(len(notes.blocks), self.num_blocks(position)):
            start = self.initial + number * self.block
            strands = [strand.turned_back() for strand in _held(memory, start, start + self.block)]
            block = FrozenStrand.gathered(strands)
            representative = self._representative(memory.heads, block, notes.mass.of(start, self.block))
            stored = memory.plan.codec.encode(block, memory.codec_notes)
            # A full disk is found here, before anything has changed.
            notes.blocks.append(stored if notes.file is None else notes.file.put(stored))
            notes.index.append(representative)

    def _representative(self, heads: Heads, block: FrozenStrand, mass_HT: Tensor) -> Tensor:
        """The mean (H, D) of each head's keys to which most attention was paid."""
        group = heads.num_heads // heads.num_kv_heads
        best = mass_HT.topk(self.representatives, dim=1).indices
        keys_HTD = block.keys.float().repeat_interleave(group, dim=0)
        return keys_HTD.gather(1, best[..., None].expand(-1, -1, keys_HTD.shape[2])).mean(dim=1)

    def _learn(self, memory: Memory) -> None:
        """Add the attention that noted queries paid to each token of their windows to its score."""
        notes, heads = _notes(memory), memory.heads
        group = heads.num_heads // heads.num_kv_heads
        notes.mass.extend(heads.num_heads, len(memory))
        for asked in notes.asked:
            for start in range(0, len(asked.positions), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                positions = asked.positions[rows]
                q_GMD = asked.queries[rows].float() * heads.scale
                q_GMD = q_GMD.unflatten(1, (heads.num_kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
                low = int(positions.min()) - self.local + 1
                for strand in _held(memory, max(low, 0), int(positions.max()) + 1):
                    scores = q_GMD @ strand.keys.float().transpose(1, 2)
                    if heads.softcap is not None:
                        scores = heads.softcap * torch.tanh(scores / heads.softcap)
                    scores = scores.unflatten(1, (group, -1)).flatten(0, 1)  # (H, Q, T)
                    distance = positions[:, None] - torch.arange(
                        strand.position, strand.position + len(strand)
                    )
                    if heads.bias is not None:
                        scores = heads.bias.applied(scores, distance)
                    shares = (scores - asked.lse[rows].T[..., None]).exp()
                    shares = shares.masked_fill((distance < 0) | (distance >= self.local), 0.0)
                    notes.mass.add(strand.position, shares.sum(dim=1))
            if not notes.learned and len(asked.positions):
                notes.learned_from = int(asked.positions[0])
            notes.learned += len(asked.positions)
        notes.asked = []

    def _remainder(self, memory: Memory, segment: Segment) -> list[FrozenStrand]:
        """Tokens that are too far back for the window of some query and not in a block yet."""
        positions = segment.position + segment.mask.depths(segment.length)
        start = self.keep_from(memory, segment.position)
        stop = int(positions.max()) - self.local + 1
        if stop <= segment.position or memory.draft is None:
            return [strand.turned_back() for strand in _held(memory, start, stop)]
        # A draft deeper than the window: its nodes are not in the order of positions.
        nodes = memory.tail.split(segment.position - memory.tail.position)[1]
        past = [strand.turned_back() for strand in _held(memory, start, segment.position)]
        return [*past, nodes.turned_back(positions)]


@dataclass
class _Asked:
    """Queries of pending rows: rotated (n, H, D), the log-sum-exp (n, H) of all they saw, positions (n,)."""

    queries: Tensor
    lse: Tensor
    positions: Tensor


class _Grown:
    """Rows of numbers in storage that grows by a quarter at a time."""

    def __init__(self) -> None:
        self.storage = torch.empty(0)
        self.length = 0

    @property
    def numbers(self) -> Tensor:
        return self.storage[: self.length]

    def append(self, row: Tensor) -> None:
        if self.length == len(self.storage):
            with torch.inference_mode(False):
                new = row.new_zeros(max(16, self.length * 5 // 4), *row.shape)
            if self.length:
                new[: self.length] = self.numbers
            self.storage = new
        self.storage[self.length] = row
        self.length += 1

    def fork(self) -> _Grown:
        twin = _Grown()
        with torch.inference_mode(False):
            twin.storage, twin.length = self.numbers.clone(), self.length
        return twin


class _Mass:
    """The attention paid to every token that is held, by each query head: (H, T)."""

    def __init__(self) -> None:
        self.storage = torch.empty(0, 0)
        self.start = 0
        self.length = 0

    def extend(self, num_heads: int, stop: int) -> None:
        """Make room for tokens before position `stop`."""
        wanted = stop - self.start
        if wanted > self.storage.shape[1]:
            with torch.inference_mode(False):
                new = torch.zeros(num_heads, max(wanted * 5 // 4, 32))
            if self.length:
                new[:, : self.length] = self.storage[:, : self.length]
            self.storage = new
        self.length = max(self.length, wanted)

    def add(self, position: int, mass: Tensor) -> None:
        first = position - self.start
        self.storage[:, first : first + mass.shape[1]] += mass

    def of(self, position: int, count: int) -> Tensor:
        first = position - self.start
        return self.storage[:, first : first + count]

    def truncate(self, length: int) -> None:
        # Past the last token all is zero, so that the next one there starts from nothing.
        kept = max(length - self.start, 0)
        self.storage[:, kept:] = 0.0
        self.length = min(self.length, kept)
        if length < self.start:
            self.start = length

    def drop_before(self, position: int) -> None:
        dropped = position - self.start
        if dropped > 0:
            with torch.inference_mode(False):
                self.storage = self.storage[:, dropped : self.length].clone()
            self.start, self.length = position, self.storage.shape[1]

    def fork(self) -> _Mass:
        twin = _Mass()
        with torch.inference_mode(False):
            twin.storage = self.storage.clone()
        twin.start, twin.length = self.start, self.length
        return twin


@dataclass
class _Blocks(Notes):
    """What lies behind the window of one layer; the keys of blocks are not rotated."""

    method: ClassVar[str] = "infllm"

    policy: InfLLM
    file: SpillFile | None
    first: FrozenStrand | None = None
    blocks: list[Strand | Spilled] = field(default_factory=list)
    index: _Grown = field(default_factory=_Grown)
    mass: _Mass = field(default_factory=_Mass)
    asked: list[_Asked] = field(default_factory=list)
    # Pending rows whose attention is in `mass` already, and the position of the first of them.
    learned: int = 0
    learned_from: int = 0
    chosen: list[int] = field(default_factory=list)
    resident: OrderedDict[int, Strand] = field(default_factory=OrderedDict)
    together: tuple[tuple[int, ...], list[Strand]] = ((), [])

    @property
    def retrieved(self) -> list[range]:
        """Positions of the tokens of each block that the last run of queries saw."""
        size = self.policy.block
        starts = (self.policy.initial + number * size for number in self.chosen)
        return [range(start, start + size) for start in starts]

    @property
    def cold_nbytes(self) -> int:
        """Bytes that blocks have in the file; blocks shared with a fork count in both."""
        return sum(block.nbytes for block in self.blocks if isinstance(block, Spilled))

    def retrieve(self, *, joined: bool) -> list[Strand]:
        """The chosen blocks; joined, those of plain numbers are one strand, which stays until others are chosen."""
        if not joined:
            return [self._load(number) for number in self.chosen]
        key = tuple(self.chosen)
        if key != self.together[0]:
            strands = [self._load(number) for number in key]
            plain = [strand for strand in strands if type(strand) is FrozenStrand]
            coded = [strand for strand in strands if type(strand) is not FrozenStrand]
            # All stand at one distance, and all are seen, so that gaps between them do not matter.
            self.together = (key, [*([FrozenStrand.gathered(plain)] if plain else []), *coded])
        return self.together[1]

    def _load(self, number: int) -> Strand:
        block = self.blocks[number]
        if isinstance(block, Strand):
            return block
        if number not in self.resident:
            self.resident[number] = block.load()
        self.resident.move_to_end(number)
        while len(self.resident) > self.policy.cached:
            self.resident.popitem(last=False)
        return self.resident[number]

    def fork(self) -> _Blocks:
        return _Blocks(
            self.policy,
            self.file,
            first=self.first,
            blocks=list(self.blocks),
            index=self.index.fork(),
            mass=self.mass.fork(),
            resident=self.resident.copy(),
            together=self.together,
        )

    def truncate(self, length: int) -> None:
        num_blocks, num_first = self.policy.num_blocks(length), self.policy.num_first_behind(length)
        if self.first is not None and num_first < len(self.first):
            self.first = self.first.split(num_first)[0] if num_first else None
        del self.blocks[num_blocks:]
        self.index.length = min(self.index.length, num_blocks)
        self.mass.truncate(length)
        self.chosen, self.together = [], ((), [])
        for number in [number for number in self.resident if number >= num_blocks]:
            del self.resident[number]
        self.learned = min(self.learned, max(length - self.learned_from, 0))
        kept = [(asked, asked.positions < length) for asked in self.asked]
        self.asked = [_Asked(a.queries[rows], a.lse[rows], a.positions[rows]) for a, rows in kept]

    def commit(self, kept: Sequence[int], count: int) -> None:
        later = [row - self.learned for row in kept if row >= self.learned]
        if self.asked:
            whole = [torch.cat(parts) for parts in zip(*(vars(a).values() for a in self.asked), strict=True)]
            self.asked = [_Asked(*(tensor[later] for tensor in whole))] if later else []
        self.learned = 0

    def tensors(self) -> list[Tensor]:
        strands = [] if self.first is None else [self.first]
        inside = [block for block in self.blocks if isinstance(block, Strand)]
        held: list[HoldsTensors] = [*strands, *inside, *self.resident.values(), *self.together[1]]
        asked = [tensor for one in self.asked for tensor in vars(one).values()]
        return [
            self.index.storage,
            self.mass.storage,
            *asked,
            *(tensor for strand in held for tensor in strand.tensors()),
        ]


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
