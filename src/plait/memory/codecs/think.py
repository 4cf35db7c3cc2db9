"""ThinK: of every old key, the channels that the prompt's last queries use least are dropped.

Paper: Xu et al. 2024, arXiv:2407.21018, section 3.2 and equation 6.
Shapes: Q queries, H query heads, G key/value heads, T tokens, D head size, V value size, K channels kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from plait.errors import ConfigError
from plait.memory.codecs.dense import Dense
from plait.memory.holding import HoldingCodec, HoldingStrand
from plait.memory.last_queries import LastQueries
from plait.memory.memory import Memory
from plait.memory.plan import Codec, Notes, Seen
from plait.memory.sealing import plain_run, taken
from plait.memory.strand import FrozenStrand, Heads, Strand
from plait.ops import Causal, Mask, Partial, native
from plait.ops.coded import CodedForm, CodedNumbers, StoredNumbers, can_be_read, coded_attention

__all__ = ["ThinK"]

_PLAIN = Dense()


@dataclass(frozen=True, kw_only=True)
class ThinK(HoldingCodec, name="think"):
    """Keep, of every old key, only the channels that matter most to the prompt's last queries.

    Lossy. Channel c of a key/value head scores `sum |q_c|^2 * sum |k_c|^2`, over the last `window` queries of
    all heads that read it and over all keys, both as they are rotated; the `floor((1 - ratio) * D)` best are
    kept, packed. They are chosen once, at the end of a prompt, which itself is read with exact attention;
    tokens that grow old later lose the same channels. Scores keep the factor of the full head size.

    A policy that stores blocks while a prompt is read, such as infllm, gets channels of each block's own: pairs of
    channels that turn together, by the last queries so far, because the keys of such blocks are not rotated.

    What is kept can be stored by another codec: `think:ratio=0.4,gear:bits=4`. The layer's geometry fixes
    how much that saves: a ratio of 0.4 takes a fifth off keys and values together.

    Args:
        ratio: fraction of key channels that is dropped.
        recent: newest tokens that keep all channels.
        window: last queries that choose.
        value_ratio: fraction of value channels that is dropped, by the size of what those queries read from
            them; a dropped channel answers with its mean over the strand. The paper only hints at it.
        chunk: tokens beyond `recent` that are pruned at once.
        sinks: first tokens of the sequence that stay plain numbers.
        inner: codec that stores what is kept; in a spec string, the one that follows.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.4
    recent: Annotated[int, Field(ge=0)] = 32
    window: Annotated[int, Field(ge=1)] = 32
    value_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    chunk: Annotated[int, Field(ge=1)] = 64
    sinks: Annotated[int, Field(ge=0)] = 0
    inner: Codec = _PLAIN

    @property
    def num_last_queries(self) -> int:
        return self.window

    def check_heads(self, heads: Heads) -> None:
        pruned = self._pruned(heads)
        for name, dropped, kept, size in (
            ("ratio", self.ratio, pruned.head_dim, heads.head_dim),
            ("value_ratio", self.value_ratio, pruned.value_dim, heads.value_dim or heads.head_dim),
        ):
            if kept == 0:
                raise ConfigError(f"ThinK.{name} must leave a channel of {size}. Got {dropped}.")
        self.inner.check_heads(pruned)

    def _pruned(self, heads: Heads) -> Heads:
        """The geometry of what is kept. Its scale is still that of all channels."""
        value_dim = heads.value_dim or heads.head_dim
        return replace(
            heads,
            head_dim=_kept(heads.head_dim, self.ratio),
            value_dim=_kept(value_dim, self.value_ratio),
            rope=None,
        )

    @property
    def _keeps_all(self) -> bool:
        return self.ratio == self.value_ratio == 0

    @property
    def learns_from_prompt(self) -> bool:
        # The keys of a block that is stored early are not rotated, so nothing can be read from its values.
        return self.value_ratio > 0

    def ready(self, count: int) -> int:
        if self._keeps_all:
            return self.inner.ready(count)
        old = count - self.recent
        return self.whole(old) if old >= self.chunk else 0

    def new_notes(self) -> Notes:
        return _Choice(self.window)

    def observes(self, memory: Memory) -> bool:
        return _choice_of(memory).key_channels is None and not self._keeps_all

    def observe(self, memory: Memory, seen: Seen) -> None:
        if self.observes(memory):
            _choice_of(memory).add(seen)

    def seal(self, memory: Memory, *, is_prompt: bool = False) -> None:
        notes = _choice_of(memory)
        if notes.key_channels is None and not is_prompt and not self._keeps_all:
            run = plain_run(memory)
            length = sum(map(len, run))
            if notes.past is None or self.ready(length - self.exact_first) == 0:
                return
            strand, queries = taken(run, 0, length), notes.past.queries
            notes.key_channels = self._key_channels(queries, strand)
            if self.value_ratio:
                notes.value_channels = self._value_channels(queries, notes.end, strand)
            notes.chosen_at = len(memory)
            notes.forget()
        super().seal(memory, is_prompt=is_prompt)

    def _key_channels(self, queries: Tensor, strand: FrozenStrand) -> Tensor:
        """Channels (G, K) of keys to keep, in their order, for queries (Q, H, D)."""
        of_queries = queries.square().sum(0).unflatten(0, (strand.heads.num_kv_heads, -1)).sum(1)
        of_keys = strand.keys.float().square().sum(1)
        return _best(of_queries * of_keys, _kept(strand.heads.head_dim, self.ratio))

    def _value_channels(self, queries: Tensor, end: int, strand: FrozenStrand) -> Tensor:
        """Channels (G, K) of values to keep, for queries (Q, H, D) that end before a position."""
        read = strand.attend(queries, end - len(queries), Causal()).out.square().sum(0)
        of_values = read.unflatten(0, (strand.heads.num_kv_heads, -1)).sum(1)
        return _best(of_values, _kept(strand.values.shape[2], self.value_ratio))

    def encode(self, strand: FrozenStrand, notes: Notes | None) -> Strand:
        if self._keeps_all:
            return self.inner.encode(strand, None)
        assert isinstance(notes, LastQueries)
        key_channels, value_channels = self._chosen(notes, strand)
        keys = _gathered(strand.keys, key_channels)
        values, means = strand.values, None
        if value_channels is not None:
            means = values.float().mean(1)
            values = _gathered(values, value_channels)
        kept = FrozenStrand(
            self._pruned(strand.heads), keys, values, offset=strand.offset, start=strand.start
        )
        inner = self.inner.encode(kept, None)
        return ThinStrand(strand.heads, inner, key_channels, value_channels, means)

    def _chosen(self, notes: LastQueries, strand: FrozenStrand) -> tuple[Tensor, Tensor | None]:
        """Channels (G, K) of keys and of values that are kept of a strand; None for all."""
        last = notes.last
        queries = None if last is None else last.last(self.window).queries
        if isinstance(notes, _Choice):
            if notes.key_channels is not None:
                return notes.key_channels, notes.value_channels
            return self._channels_of_block(queries, strand), None
        # Whoever holds this codec has noted the queries that ask for these keys, in the same frame.
        assert queries is not None
        keys = self._key_channels(queries, strand)
        return keys, self._value_channels(queries, notes.end, strand) if self.value_ratio else None

    def _channels_of_block(self, queries: Tensor | None, strand: FrozenStrand) -> Tensor:
        """Channels (G, K) of a block to keep, for queries (Q, H, D) rotated in another frame than its keys.

        A rotation leaves the size of a pair of channels as it is, so that pairs are chosen, and of the last pair
        the first channel only where an odd number is kept.
        """
        heads = strand.heads
        of_keys = strand.keys.float().square().sum(1)
        of_queries = torch.ones_like(of_keys)
        if queries is not None:
            of_queries = queries.square().sum(0).unflatten(0, (heads.num_kv_heads, -1)).sum(1)
        half = 0 if heads.rope is None else len(heads.rope.frequencies)
        scores = of_queries * of_keys
        if half:
            first, second = slice(0, half), slice(half, 2 * half)
            scores[:, first] = of_queries[:, first] + of_queries[:, second]
            scores[:, first] *= of_keys[:, first] + of_keys[:, second]
            scores[:, second] = scores[:, first]
        return _best(scores, _kept(heads.head_dim, self.ratio))


def _kept(size: int, ratio: float) -> int:
    """floor((1 - ratio) * size), also where that product is off by rounding."""
    return size - math.ceil(size * ratio - 1e-9)


def _best(scores: Tensor, count: int) -> Tensor:
    """The channels (G, count) of the highest scores (G, D), in the order of channels; 16-bit."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values.to(torch.int16)


def _gathered(numbers: Tensor, channels: Tensor) -> Tensor:
    """The channels (G, K) of numbers (G, T, D), packed."""
    return numbers.gather(2, channels.long()[:, None].expand(-1, numbers.shape[1], -1))


class _Choice(LastQueries):
    """The last queries until channels are chosen, then those channels.

    Args:
        window: how many queries to keep.

    Attributes:
        key_channels, value_channels: (G, K), None until chosen or where all are kept.
        chosen_at: length of the sequence at that moment.
    """

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.key_channels: Tensor | None = None
        self.value_channels: Tensor | None = None
        self.chosen_at = 0

    def splice(self, source: Notes, start: int, stop: int, position: int) -> None:
        # Moved strands come with channels of their own.
        assert isinstance(source, _Choice)
        if self.key_channels is None and source.key_channels is not None:
            self.key_channels, self.value_channels = source.key_channels, source.value_channels
            self.chosen_at = position
            self.forget()

    def truncate(self, length: int) -> None:
        super().truncate(length)
        if length < self.chosen_at:
            self.key_channels, self.value_channels, self.chosen_at = None, None, 0

    def tensors(self) -> list[Tensor]:
        channels = (self.key_channels, self.value_channels)
        return [*super().tensors(), *(tensor for tensor in channels if tensor is not None)]


def _choice_of(memory: Memory) -> _Choice:
    assert isinstance(memory.codec_notes, _Choice)
    return memory.codec_notes


class ThinStrand(HoldingStrand):
    """A strand of fewer channels, seen as one of all channels.

    Args:
        heads: the layer's geometry.
        inner: keys and values with the kept channels only.
        key_channels: (G, K) which of D they are.
        value_channels: (G, K) which of V they are; None for all.
        value_means: (G, V) what dropped value channels answer; None when none is dropped.
    """

    found_later: ClassVar[Mapping[str, Any]] = {"_native": "unknown"}

    def __init__(
        self,
        heads: Heads,
        inner: Strand,
        key_channels: Tensor,
        value_channels: Tensor | None = None,
        value_means: Tensor | None = None,
    ) -> None:
        super().__init__(heads, inner, offset=inner.offset, start=inner.start)
        self.key_channels, self.value_channels, self.value_means = key_channels, value_channels, value_means
        self._native: CodedForm | Literal["unknown"] | None = "unknown"

    def __len__(self) -> int:
        return len(self.inner)

    def native_form(self) -> CodedForm | None:
        if self._native == "unknown":
            self._native = self._thinned(self.inner)
        return self._native

    def _thinned(self, inner: Strand) -> CodedForm | None:
        form = inner.native_form()
        if form is None:
            if not isinstance(inner, FrozenStrand):
                return None
            widths = inner.keys.shape[2], inner.values.shape[2]
            if not can_be_read(*widths, self.heads.head_dim, like=inner.keys):
                return None
            plain_keys, plain_values = (
                CodedNumbers.of(StoredNumbers.of_numbers(each)) for each in (inner.keys, inner.values)
            )
            form = CodedForm(plain_keys, plain_values, 0)
        keys, values, first = form
        keys = keys.thinned(self.key_channels, self.heads.head_dim)
        if self.value_channels is not None:
            assert self.value_means is not None
            values = values.thinned(self.value_channels, self.value_means.shape[1], self.value_means)
        return CodedForm(keys, values, first)

    def attend(self, q: Tensor, first_query: int, mask: Mask, window: int | None = None) -> Partial:
        form = self.native_form() if native.takes((q, mask, self.heads.bias)) else None
        if form is None:
            return self._attend_in_torch(q, first_query, mask, window)
        return coded_attention(
            q,
            form,
            len(self),
            scale=self.heads.scale,
            value_dim=self.heads.value_dim or self.heads.head_dim,
            mask=mask,
            first_query=first_query,
            first_key=self.position,
            window=window,
            softcap=self.heads.softcap,
        )

    def _attend_in_torch(self, q: Tensor, first_query: int, mask: Mask, window: int | None) -> Partial:
        num_kv_heads, group = self.heads.num_kv_heads, self.heads.num_heads // self.heads.num_kv_heads
        channels = self.key_channels.long()[None, :, None].expand(len(q), -1, group, -1)
        thin = q.unflatten(1, (num_kv_heads, group)).gather(3, channels).flatten(1, 2)
        part = self.inner.attend(thin, first_query, mask, window)
        if self.value_channels is None or self.value_means is None:
            return part
        # Weights sum to 1, so a constant channel answers with its constant; a query that saw nothing with 0.
        out = self.value_means[None, :, None].expand(len(q), -1, group, -1).clone()
        channels = self.value_channels.long()[None, :, None].expand(len(q), -1, group, -1)
        out.scatter_(3, channels, part.out.unflatten(1, (num_kv_heads, group)))
        nothing = (part.lse == -math.inf)[..., None]
        return Partial(out.flatten(1, 2).masked_fill(nothing, 0.0), part.lse)

    def split(self, at: int) -> tuple[Self, Self]:
        front, back = map(self._holding, self.inner.split(at))
        back.start = back.inner.start
        return front, back

    def tensors(self) -> list[Tensor]:
        own = (self.key_channels, self.value_channels, self.value_means)
        return [*super().tensors(), *(tensor for tensor in own if tensor is not None)]
