"""SnapKV: of a prompt, each head keeps the tokens that the prompt's last queries attend to most.

Paper: Li et al. 2024, arXiv:2404.14469, section 4 and listing 1.
Shapes: Q queries, H query heads, G key/value heads, T tokens of the strand, D head size, K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.memory.codecs.dense import Dense
from plait.memory.holding import HoldingCodec, HoldingStrand
from plait.memory.last_queries import Asked, LastQueries
from plait.memory.memory import Memory
from plait.memory.plan import Codec, Notes, Seen
from plait.memory.sealing import plain_run
from plait.memory.strand import FrozenStrand, Heads, Layout, Strand
from plait.ops import Mask, Partial, capped
from plait.ops.coded import CodedForm

__all__ = ["EvictedStrand", "SnapKV"]

_PLAIN = Dense()

# Tokens that are scored at once, so that no row of weights over a whole prompt is written for each query.
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class SnapKV(HoldingCodec, name="snapkv"):
    """Keep, of a long prompt, only the tokens that its last queries attend to most, for each head its own.

    Lossy: what is dropped is gone, and a later question may have asked for it. A token scores the attention
    that the last `window` queries pay to it, summed over them, averaged over the query heads that read its
    key/value head and then over its `kernel` neighbours; the `capacity - window` best before those `window`
    tokens are kept, with the angles at which they were rotated. The `window` tokens stay plain numbers.

    A prompt is read with exact attention and chosen from at its end. Tokens behind it stay plain numbers until
    `capacity + chunk` of them have come, from texts or answers, and are then chosen from in the same way,
    so that each such run adds up to `capacity` tokens to what is held. Layers with a sliding window of their own keep
    all that it shows.

    What is kept can be stored by another codec: `snapkv:capacity=512,gear:bits=4`, in whole groups of it, or
    `snapkv:capacity=512,think:ratio=0.4`, whose channels are chosen from the kept keys by the same queries.

    Args:
        capacity: tokens of a run that are held after it was chosen from, the last `window` included.
        window: last queries that choose, and last tokens that all stay.
        kernel: neighbours whose scores are averaged, odd; 1 for none. Around the ends zeros are counted.
        chunk: tokens beyond `capacity` from which on a run is chosen from.
        sinks: first tokens of the sequence that stay plain numbers.
        inner: codec that stores what is kept; in a spec string, the one that follows.
    """

    drops_tokens: ClassVar[bool] = True
    notes_last_queries: ClassVar[bool] = True

    capacity: Annotated[int, Field(ge=2)] = 512
    window: Annotated[int, Field(ge=1)] = 32
    kernel: Annotated[int, Field(ge=1)] = 5
    chunk: Annotated[int, Field(ge=1)] = 64
    sinks: Annotated[int, Field(ge=0)] = 0
    inner: Codec = _PLAIN

    def check(self) -> None:
        super().check()
        if self.capacity <= self.window:
            raise ConfigError(
                f"SnapKV.capacity must exceed window {self.window}, which is kept whole. Got {self.capacity}."
            )
        if self.kernel % 2 == 0:
            raise ConfigError(f"SnapKV.kernel must be odd, so that it has a middle. Got {self.kernel}.")
        if self._num_kept == 0:
            raise ConfigError(
                f"SnapKV.capacity leaves {self.capacity - self.window} tokens beyond window {self.window}, too few for "
                f"codec {self.inner}. Raise capacity, or lower the inner codec's group."
            )

    @property
    def _num_kept(self) -> int:
        """Tokens K that are kept of those before the window."""
        return self.inner.whole(self.capacity - self.window)

    def check_heads(self, heads: Heads) -> None:
        if heads.bias is not None:
            raise ConfigError(
                "SnapKV keeps tokens without their places, which a bias by distance needs. Use another codec with this "
                "model, such as gear or think."
            )
        self.inner.check_heads(heads)

    @property
    def learns_from_prompt(self) -> bool:
        return True

    def whole(self, count: int) -> int:
        return count

    def ready(self, count: int) -> int:
        return count - self.window if count >= self.capacity + self.chunk else 0

    def rows_at_once(self, memory: Memory, least: int, most: int) -> int:
        return super().rows_at_once(memory, least, most) if memory.window is None else most

    def new_notes(self) -> LastQueries:
        return LastQueries(max(self.window, self.inner.num_last_queries))

    def observes(self, memory: Memory) -> bool:
        if memory.window is not None:
            return False
        notes = _notes_of(memory)
        # Only the last queries before a choice have a say. Once some rows are noted, so are those pending with them.
        first = self.capacity + self.chunk - notes.window
        return notes.pending is not None or self._count_plain(memory) > first

    def _count_plain(self, memory: Memory) -> int:
        """Tokens that may be chosen from, pending rows included."""
        run = plain_run(memory, self.exact_first)
        return sum(map(len, run)) - max(self.exact_first - run[0].position, 0)

    def observe(self, memory: Memory, seen: Seen) -> None:
        if not self.observes(memory):
            return
        notes = _notes_of(memory)
        if notes.reach != seen.segment.position:
            # Rows between those and these were not noted.
            notes.forget()
        notes.add(seen)

    def seal(self, memory: Memory, *, is_prompt: bool = False) -> None:
        notes = _notes_of(memory)
        # Without queries, as behind tokens that were moved here, nothing can be chosen yet.
        if memory.window is not None or notes.past is None:
            return
        tail = memory.tail
        super().seal(memory, is_prompt=is_prompt)
        if memory.tail is not tail:
            notes.forget()

    def encode(self, strand: FrozenStrand, notes: Notes | None) -> EvictedStrand:
        assert isinstance(notes, LastQueries)
        assert notes.past is not None
        places = self._chosen(strand, notes.past.last(self.window))
        keys, values = (
            numbers.gather(1, places[..., None].expand(-1, -1, numbers.shape[2]))
            for numbers in (strand.keys, strand.values)
        )
        # They end where the strand ends, so that whoever stands behind it sees all of them.
        start = strand.start + len(strand) - places.shape[1]
        kept = FrozenStrand(strand.heads, keys, values, offset=strand.offset, start=start)
        inner = self.inner.encode(kept, notes)
        return EvictedStrand(strand.heads, inner, len(strand), offset=strand.offset, start=strand.start)

    def _chosen(self, strand: FrozenStrand, asked: Asked) -> Tensor:
        """The tokens (G, K) that each head keeps, in their order."""
        scores = attention_paid(strand, asked)
        # A window of `kernel` tokens, zeros beside the ends, is the same as torch's pooling with its padding counted.
        pooled = torch.nn.functional.avg_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.topk(self._num_kept, dim=-1).indices.sort(dim=-1).values


def attention_paid(strand: FrozenStrand, asked: Asked) -> Tensor:
    """The attention (G, T) that queries behind a strand pay to each of its tokens, summed over queries.

    Averaged over the query heads that read one key/value head. The weights are those of everything that the queries
    saw, of which the strand is a part.
    """
    heads = strand.heads
    group = heads.num_heads // heads.num_kv_heads
    queries = asked.queries.unflatten(1, (heads.num_kv_heads, group))
    lse = asked.lse.unflatten(1, (heads.num_kv_heads, group)).permute(1, 2, 0)[..., None]
    sums = []
    for low in range(0, len(strand), _BLOCK):
        # In storage of one form, whatever the strand was cut from, so that sums take one order.
        keys = strand.keys[:, low : low + _BLOCK].to(
            torch.float32, copy=True, memory_format=torch.contiguous_format
        )
        scores = capped(torch.einsum("qgnd,gtd->gnqt", queries, keys) * heads.scale, heads.softcap)
        sums.append((scores - lse).exp().sum(2).mean(1))
    return torch.cat(sums, dim=-1)


def _notes_of(memory: Memory) -> LastQueries:
    assert isinstance(memory.codec_notes, LastQueries)
    return memory.codec_notes


class EvictedStrand(HoldingStrand):
    """Some tokens of a run, of each head its own, that stand for all of it.

    The stored keys are rotated for their own places, and said to stand one after the other at the end of the run:
    masks, which know tokens by where they stand, show them to every query behind it.

    Args:
        heads: the layer's geometry.
        inner: the kept tokens.
        length: tokens that they stand for.
        offset, start: where the run stands, see `Strand`.
    """

    is_divisible: ClassVar[bool] = False

    def __init__(self, heads: Heads, inner: Strand, length: int, *, offset: int = 0, start: int = 0) -> None:
        super().__init__(heads, inner, offset=offset, start=start)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def attend(self, q: Tensor, first_query: int, mask: Mask, window: int | None = None) -> Partial:
        return self.inner.attend(q, first_query, mask, window)

    def native_form(self) -> CodedForm | None:
        return self.inner.native_form()

    @property
    def layout(self) -> Layout | None:
        return self.inner.layout

    @property
    def place(self) -> tuple[int, ...] | None:
        return self.inner.place

    def check_split(self, at: int) -> None:
        end = self.position + self.length
        raise ConfigError(
            f"Cannot cut tokens {self.position} to {end - 1} at {self.position + at}: snapkv has dropped some of them. "
            f"Go back to at least {end} or at most {self.position} tokens, or read the text again from there."
        )

    def split(self, at: int) -> tuple[Self, Self]:
        self.check_split(at)
        raise AssertionError

    def reframed(self, offset: int) -> Self:
        inner = self.inner.reframed(offset)
        if inner is self.inner:
            return self
        twin = self._holding(inner)
        twin.offset, twin.start = offset, self.start + self.offset - offset
        return twin
