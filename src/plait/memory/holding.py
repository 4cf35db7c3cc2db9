"""Codecs that leave numbers for another codec to store, and the strands they make of its strands."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from plait.errors import IncompatibleError
from plait.memory.plan import Codec
from plait.memory.strand import Heads, Strand

__all__ = ["HoldingCodec", "HoldingStrand"]


class HoldingCodec(Codec):
    """A codec with another one, `inner`, that stores what it keeps. A dataclass that derives from it has `inner` last.

    Attributes:
        sinks: first tokens of the sequence that stay plain numbers.
        inner: codec that stores what is kept.
        notes_last_queries: whether its notes are the last queries, so that it may hold a codec that reads those.
    """

    holdable: ClassVar[bool] = False
    notes_last_queries: ClassVar[bool] = False

    if TYPE_CHECKING:

        @property
        def sinks(self) -> int: ...

        @property
        def inner(self) -> Codec: ...

    def check(self) -> None:
        if not (self.inner.holdable or (self.notes_last_queries and self.inner.num_last_queries)):
            raise IncompatibleError(
                f"Codec {self.name} cannot hold {self.inner.name}: that one changes or chooses what it stores "
                f"by itself. Use one of them, or {self.name} with dense or gear."
            )

    def __str__(self) -> str:
        own = fields(self)[:-1]  # type: ignore[arg-type]
        changed = [f"{f.name}={getattr(self, f.name)}" for f in own if getattr(self, f.name) != f.default]
        text = self.name + (":" + ",".join(changed) if changed else "")
        is_plain = self.inner == fields(self)[-1].default  # type: ignore[arg-type]
        return text if is_plain else f"{text},{self.inner}"

    def holding(self, inner: Codec) -> Codec:
        return replace(self, inner=inner)  # type: ignore[type-var]

    @property
    def tail_dtype(self) -> torch.dtype:
        return self.inner.tail_dtype

    @property
    def exact_first(self) -> int:
        return max(self.sinks, self.inner.exact_first)

    def whole(self, count: int) -> int:
        return self.inner.whole(count)


class HoldingStrand(Strand):
    """A strand that is stored as another one, and seen in another way.

    Args:
        heads: the layer's geometry.
        inner: what is stored.
        offset, start: where it stands, see `Strand`.
    """

    found_later: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, heads: Heads, inner: Strand, *, offset: int, start: int) -> None:
        self.heads, self.inner = heads, inner
        self.offset, self.start = offset, start

    def _holding(self, inner: Strand) -> Self:
        """The same with other tensors inside."""
        twin = copy.copy(self)
        twin.inner = inner
        for name, value in self.found_later.items():
            setattr(twin, name, value)
        return twin

    def moved(self, by: int) -> Self:
        twin = super().moved(by)
        twin.inner = self.inner.moved(by)
        return twin

    def weighed_by(self, heads: Heads) -> Self:
        twin = super().weighed_by(heads)
        twin.inner = self.inner.weighed_by(replace(self.inner.heads, **heads.scoring))
        return twin

    def copied(self) -> Self:
        return self._holding(self.inner.copied())

    def restarted(self, start: int) -> Self:
        twin = super().restarted(start)
        twin.inner = self.inner.restarted(self.inner.start + start - self.start)
        return twin

    def tensors(self) -> list[Tensor]:
        return self.inner.tensors()
