"""A strand whose keys and values are stored in few bits and read a block of tokens at a time.

Shapes: Q queries, H query heads, G key/value heads, T tokens of the strand, D head size, V value size,
r rank of what is added to the codes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from plait import ops
from plait.errors import ConfigError
from plait.memory.codes import LARGEST
from plait.memory.plan import Codec
from plait.memory.strand import FrozenStrand, Heads, Strand
from plait.ops import Mask, Partial, empty_partial, merge_all, native
from plait.ops.coded import CodedForm, CodedNumbers, coded_attention

__all__ = ["BLOCK", "Coded", "CodedStrand", "Factors", "check_storable", "matrix_of"]

# Tokens that are read at once, at fixed places of the storage: a result does not depend on how a strand
# was split elsewhere.
BLOCK = 256


class Factors(NamedTuple):
    """A low-rank part of a block, `tokens @ channels.T` for each head.

    Attributes:
        tokens: (G, t, r) fp32.
        channels: (G, D, r) fp32.
    """

    tokens: Tensor
    channels: Tensor


class Coded(Protocol):
    """Stored keys or values (T, G * D) of one strand; never changed once made."""

    def __len__(self) -> int: ...

    def rows(self, low: int, high: int) -> Tensor:
        """Tokens [low, high) as numbers (t, G * D) fp32, without the low-rank part."""
        ...

    def factors(self, low: int, high: int) -> Factors | None:
        """The low-rank part of tokens [low, high); None where there is none."""
        ...

    def cut(self, low: int, high: int) -> Coded:
        """Tokens [low, high) in storage of their own."""
        ...

    def native(self, num_heads: int) -> CodedNumbers | None:
        """These numbers as a native kernel reads them; None where none can."""
        ...

    def tensors(self) -> list[Tensor]: ...


def check_storable(codec: Codec, strand: FrozenStrand) -> None:
    """Raise `ConfigError` if keys or values are not finite, or too large for scales in fp16."""
    for name, numbers in (("keys", strand.keys), ("values", strand.values)):
        # NaN compares as false, so it is refused too.
        if not bool((numbers.abs() <= LARGEST).all()):
            raise ConfigError(
                f"{codec.name} cannot store {name} that are NaN, infinite or above 65,504 in size. Got some among "
                f"tokens {strand.position} to {strand.position + len(strand) - 1}; check the model's weights."
            )


def matrix_of(tokens: Tensor) -> Tensor:
    """Keys or values (G, T, D) as a matrix (T, G * D) fp32."""
    return tokens.transpose(0, 1).flatten(1).float()


class CodedStrand(Strand):
    """Tokens [low, high) of stored keys and values. At most `BLOCK` of them are numbers at any time.

    The low-rank part of keys and values is never multiplied out: it adds r channels to the queries and
    keys of a block, and r to its output.

    Args:
        heads: the layer's geometry.
        keys: rotated in the strand's frame.
        values: as many tokens.
        offset: where the frame starts, in the sequence's positions.
        start: frame position of the first token.
    """

    found_later: ClassVar[Mapping[str, Any]] = {"_native": "unknown"}

    def __init__(self, heads: Heads, keys: Coded, values: Coded, *, offset: int = 0, start: int = 0) -> None:
        self.heads = heads
        self.keys, self.values = keys, values
        self.offset, self.start = offset, start
        # Where this strand's tokens stand in keys and values.
        self.rows = range(len(keys))
        # Keys and values as kernels read them: not made yet, or None where there are none.
        self._native: tuple[CodedNumbers, CodedNumbers] | Literal["unknown"] | None = "unknown"

    def __len__(self) -> int:
        return len(self.rows)

    def native_form(self) -> CodedForm | None:
        if self._native == "unknown":
            keys, values = (stored.native(self.heads.num_kv_heads) for stored in (self.keys, self.values))
            self._native = None if keys is None or values is None else (keys, values)
        return None if self._native is None else CodedForm(*self._native, self.rows.start)

    def attend(self, q: Tensor, first_query: int, mask: Mask, window: int | None = None) -> Partial:
        value_dim = self.heads.value_dim or self.heads.head_dim
        form = self.native_form() if native.takes((q, mask, self.heads.bias)) else None
        if form is None:
            return self._attend_in_torch(q, first_query, mask, window)
        return coded_attention(
            q,
            form,
            len(self),
            scale=self.heads.scale,
            value_dim=value_dim,
            mask=mask,
            first_query=first_query,
            first_key=self.position,
            window=window,
            softcap=self.heads.softcap,
        )

    def _attend_in_torch(self, q: Tensor, first_query: int, mask: Mask, window: int | None) -> Partial:
        num_queries, num_heads = q.shape[:2]
        group = num_heads // self.heads.num_kv_heads
        parts: list[Partial] = []
        wide = value_channels = None
        for low, high in self._blocks():
            first_key = self.position + low
            if window is not None:
                view = mask.view(first_query, range(num_queries), first_key, high - low, window, q.device)
                if view.low >= view.high:
                    continue
            keys, key_channels = _block(self.keys, self.rows[low:high], self.heads)
            values, value_channels = _block(self.values, self.rows[low:high], self.heads)
            if key_channels is not None and wide is None:
                added = torch.einsum("qgnd,gdr->qgnr", q.float().unflatten(1, (-1, group)), key_channels)
                wide = torch.cat([q.float(), added.flatten(1, 2)], dim=-1)
            part = ops.partial_attention(
                q if wide is None else wide,
                keys,
                values,
                **self.heads.scoring,
                mask=mask,
                first_query=first_query,
                first_key=first_key,
                window=window,
            )
            parts.append(part)
        value_dim = self.heads.value_dim or self.heads.head_dim
        if not parts:
            return empty_partial(num_queries, num_heads, value_dim, q.device)
        out, lse = merge_all(parts)
        if out.shape[-1] > value_dim:
            assert value_channels is not None
            added = out[..., value_dim:].unflatten(1, (-1, group))
            out = out[..., :value_dim] + torch.einsum("qgnr,gdr->qgnd", added, value_channels).flatten(1, 2)
        return Partial(out, lse)

    def dense(self) -> FrozenStrand:
        """The tokens as plain numbers, fp32, for tests and for storing them in another form."""
        blocks = []
        rows = self.rows
        for stored in (self.keys, self.values):
            numbers = stored.rows(rows.start, rows.stop).unflatten(1, (self.heads.num_kv_heads, -1))
            numbers = numbers.transpose(0, 1)
            factors = stored.factors(rows.start, rows.stop)
            if factors is not None:
                numbers = numbers + factors.tokens @ factors.channels.transpose(1, 2)
            blocks.append(numbers)
        return FrozenStrand(self.heads, *blocks, offset=self.offset, start=self.start)

    def split(self, at: int) -> tuple[Self, Self]:
        front, back = copy.copy(self), copy.copy(self)
        front.rows, back.rows = self.rows[:at], self.rows[at:]
        back.start = self.start + at
        return front, back

    def copied(self) -> Self:
        twin = copy.copy(self)
        twin.keys = self.keys.cut(self.rows.start, self.rows.stop)
        twin.values = self.values.cut(self.rows.start, self.rows.stop)
        twin.rows = range(len(self))
        twin._native = "unknown"
        return twin

    def tensors(self) -> list[Tensor]:
        return [*self.keys.tensors(), *self.values.tensors()]

    def _blocks(self) -> list[tuple[int, int]]:
        """Runs of this strand's tokens, each within one block of the stored keys."""
        first, stop = self.rows.start, self.rows.stop
        borders = [first, *range((first // BLOCK + 1) * BLOCK, stop, BLOCK), stop]
        return [(low - first, high - first) for low, high in pairwise(borders)]


def _block(stored: Coded, rows: range, heads: Heads) -> tuple[Tensor, Tensor | None]:
    """Stored tokens (G, t, D + r), their low-rank part as r more channels, and its other factor (G, D, r)."""
    numbers = stored.rows(rows.start, rows.stop).unflatten(1, (heads.num_kv_heads, -1)).transpose(0, 1)
    factors = stored.factors(rows.start, rows.stop)
    if factors is None:
        return numbers, None
    return torch.cat([numbers, factors.tokens], dim=-1), factors.channels
