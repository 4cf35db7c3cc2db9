"""APE: contexts that are read apart, at the same positions, and attended to together.

Paper: Yang, Chen, Chen 2025, arXiv:2502.05431, section 4. With scores s of a query against the tokens of
all contexts, temperature T and scale S (Q queries, H heads):

    z = logsumexp(s / T)     out = softmax(s / T) V     lse = S T z     (Q, H), (Q, H, V), (Q, H)

and `out` with `lse` joins the rest of the past as any part does. T < 1 sharpens attention that spreads
over contexts which have not seen each other, and T z undoes how that inflates their mass; S < 1 lowers
the mass, which grows with the number of contexts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.memory.strand import Group, Heads, Strand
from plait.ops import Mask, Partial, Rope, merge_all, rotate

__all__ = ["ParallelGroup"]


class ParallelGroup(Strand):
    """Several contexts at the same positions, as one strand.

    Its length is that of the longest context. Each context was read alone, with only what stands before
    the group in view; their order does not matter. The weighting is applied once, after the contexts were
    merged with each other, because it is not associative with other merges.

    Args:
        contexts: strands of each context, whose first tokens stand at one position, at least one context.
        temperature: T, above 0. Below 1 attention within the contexts is sharper.
        scale: S, above 0. Below 1 the contexts together weigh less.

    Raises:
        ConfigError: no context, contexts that start at different positions, or a setting that is not above 0.
    """

    is_divisible: ClassVar[bool] = False

    def __init__(
        self, contexts: Sequence[Sequence[Strand]], *, temperature: float = 1.0, scale: float = 1.0
    ) -> None:
        for name, value in (("temperature", temperature), ("scale", scale)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"ParallelGroup.{name} must be above 0. Got {value}.")
        firsts = {context[0].position if context else None for context in contexts}
        if len(firsts) != 1 or None in firsts:
            raise ConfigError(
                f"ParallelGroup takes contexts of at least one token that start at one position. Got {firsts or None}."
            )
        self.contexts = [list(context) for context in contexts]
        self.temperature, self.scale = temperature, scale
        self.heads = self.contexts[0][0].heads
        self.offset, self.start = 0, self.contexts[0][0].position
        heads = self.heads if temperature == 1 else self.heads.tempered(temperature)
        self._strands = _with_heads(self.contexts, heads)

    def __len__(self) -> int:
        return max(context[-1].position + len(context[-1]) for context in self.contexts) - self.start

    def attend(self, q: Tensor, first_query: int, mask: Mask, window: int | None = None) -> Partial:
        # Positions inside the group are those at which its contexts were read.
        first_query -= self.offset
        together = merge_all(
            strand.attend(self._in_frame(q, strand.offset), first_query, mask, window)
            for strand in self._strands
        )
        return Partial(together.out, together.lse * (self.scale * self.temperature))

    @property
    def group(self) -> Group:
        strands = [strand.moved(self.offset) for context in self.contexts for strand in context]
        return Group(strands, self.temperature, self.scale * self.temperature)

    def weighted(self, *, temperature: float, scale: float) -> ParallelGroup:
        """The same contexts with another temperature and scale; shares storage."""
        twin = ParallelGroup(self.contexts, temperature=temperature, scale=scale)
        twin.offset = self.offset
        return twin

    def split(self, at: int) -> tuple[Self, Self]:
        self.check_split(at)
        raise AssertionError

    def check_split(self, at: int) -> None:
        raise ConfigError(
            f"{len(self.contexts)} parallel contexts stand at the same positions {self.position} to "
            f"{self.position + len(self) - 1} and cannot be cut at {self.position + at}. Go back to at most "
            f"{self.position}, or read a question behind them first."
        )

    def copied(self) -> Self:
        twin = copy.copy(self)
        twin.contexts = [[strand.copied() for strand in context] for context in self.contexts]
        twin._strands = _with_heads(twin.contexts, self._strands[0].heads)
        return twin

    def tensors(self) -> list[Tensor]:
        return [tensor for strand in self._strands for tensor in strand.tensors()]

    def _in_frame(self, q: Tensor, offset: int) -> Tensor:
        """Queries rotated for this group's frame, rotated for a frame that starts `offset` later."""
        rope = self.heads.rope
        if offset == 0 or rope is None:
            return q
        # The amplitude is in the queries already.
        return rotate(q, Rope(rope.frequencies).angles(torch.tensor([-offset], device=q.device)))


def _with_heads(contexts: Sequence[Sequence[Strand]], heads: Heads) -> list[Strand]:
    """The strands of all contexts, sharing storage, with other factors on the scores."""
    return [strand.weighed_by(heads) for context in contexts for strand in context]
