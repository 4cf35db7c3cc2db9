"""One layer's past of one sequence: strands, and the choices of how they are stored and seen.

Shapes: N packed rows, Q queries, H query heads, G key/value heads, D head size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.memory.plan import MemoryPlan, Visit
from plait.memory.rows import Rows, Segment
from plait.memory.strand import DenseStrand, Heads, Strand
from plait.ops import Causal, Everything, Mask, Partial, empty_partial, merge_all, rotate

__all__ = ["Memory", "attend"]


class Memory:
    """One layer's past: strands in the order of the sequence, the last of them a dense tail.

    New tokens are written to the tail. Rows written since the last `commit` are *pending*: they may
    be a draft tree of which `commit` keeps one path.

    Args:
        heads: the layer's geometry.
        plan: codec, policy and device.
        window: the model's own sliding window in positions, or None.
    """

    def __init__(self, heads: Heads, plan: MemoryPlan, window: int | None = None) -> None:
        self.heads = heads
        self.plan = plan
        self.window = window
        self.strands: list[Strand] = []
        self.tail = self._new_tail(0)
        self.pending = 0

    def __len__(self) -> int:
        """Position of the next token, that is how many tokens have been seen."""
        return self.tail.position + len(self.tail)

    def all_strands(self) -> list[Strand]:
        """Every strand that holds a token, oldest first."""
        return [strand for strand in [*self.strands, self.tail] if len(strand)]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, position: int | None = None, mask: Mask | None = None
    ) -> Tensor:
        """Remember keys and values, and answer the queries that came with them.

        Args:
            q: (Q, H, D), not rotated.
            k: (Q, G, D), not rotated.
            v: (Q, G, V).
            position: of the first row; the next position when left out.
            mask: what each row sees of this call's rows; causal when left out.

        Returns:
            (Q, H, V) fp32.
        """
        start = len(self) if position is None else position
        rows = Rows([(q.shape[0], start, mask or Causal())], device=q.device)
        return attend([self], q, k, v, rows)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write rows behind the tail; they are pending until `commit`.

        Args:
            keys: (n, G, D), rotated in the tail's frame.
            values: (n, G, V).
        """
        self.tail.append(keys, values)
        self.pending += keys.shape[0]

    def commit(self, path: Sequence[int] | Tensor | None = None) -> None:
        """Make pending rows part of the past.

        Args:
            path: indices, among the pending rows, of those to keep, in order; all when left out.

        Raises:
            ConfigError: an index is not that of a pending row.
        """
        if path is not None:
            kept = torch.as_tensor(path, dtype=torch.int64)
            if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < self.pending:
                raise ConfigError(
                    f"commit takes indices of the {self.pending} pending rows. Got {kept.tolist()}."
                )
            if kept.tolist() != list(range(self.pending)):
                self.tail.keep(kept.to(self.tail.keys.device), len(self.tail) - self.pending)
        self.pending = 0
        sealed, self.tail = self.plan.codec.seal(self.tail)
        self.strands.extend(sealed)
        self.plan.policy.settle(self)

    def truncate(self, length: int) -> None:
        """Forget every token at position `length` or later.

        Raises:
            ConfigError: `length` is negative, or those tokens were already dropped by the policy.
        """
        if not 0 <= length <= len(self):
            raise ConfigError(f"truncate takes a length from 0 to {len(self)}. Got {length}.")
        self.pending = 0
        if length >= self.tail.position:
            self.tail.truncate(length - self.tail.position)
            return
        kept: list[Strand] = []
        end = 0
        for strand in self.strands:
            if strand.position >= length:
                break
            kept.append(
                strand.split(length - strand.position)[0]
                if strand.position + len(strand) > length
                else strand
            )
            end = kept[-1].position + len(kept[-1])
        if end != length:
            raise ConfigError(
                f"Cannot go back to {length} tokens: {self.plan.policy} kept none between {end} and "
                f"{self.tail.position}. Go back to {end} or less."
            )
        self.strands = kept
        self.tail = self._new_tail(length)

    def fork(self) -> Memory:
        """A second memory with the same past. Both share what is stored; each writes to a tail of its own.

        The tail of this memory becomes a shared strand, so later results of both equal those of an
        unforked memory up to rounding.
        """
        self.commit()
        if len(self.tail):
            self.strands.append(self.tail)
            self.tail = self._new_tail(len(self))
        twin = Memory(self.heads, self.plan, self.window)
        twin.strands = list(self.strands)
        twin.tail = self._new_tail(len(self))
        return twin

    def nbytes(self) -> int:
        """Bytes allocated for keys, values and whatever the codec keeps beside them."""
        return sum(strand.nbytes() for strand in [*self.strands, self.tail])

    def _new_tail(self, position: int) -> DenseStrand:
        return DenseStrand(
            self.heads, start=position, dtype=self.plan.codec.tail_dtype, device=self.plan.device
        )


def attend(memories: Sequence[Memory], q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Remember the rows of several sequences and answer their queries, in one layer.

    A strand that several sequences share, and see whole, is visited once with all their queries
    (Juravsky et al. 2024, arXiv:2402.05099); the parts are then merged for each sequence.

    Args:
        memories: one for each segment of `rows`, all of one layer.
        q: (N, H, D), not rotated.
        k: (N, G, D), not rotated.
        v: (N, G, V).
        rows: which segment and position each row belongs to.

    Returns:
        (N, H, V) fp32.
    """
    heads = memories[0].heads
    in_frame = _Frames(heads, q, rows)
    offsets = [memory.tail.offset for memory in memories]
    keys = k if heads.rope is None else rotate(k, rows.angles(heads.rope, offsets))
    for memory, segment in zip(memories, rows.segments, strict=True):
        memory.append(keys[segment.rows], v[segment.rows])

    # parts[s] holds segment s's partials in the order of its visits, whatever else is in the batch.
    parts: list[list[Partial | None]] = []
    shared: dict[int, list[tuple[int, int, Visit]]] = {}
    for index, (memory, segment) in enumerate(zip(memories, rows.segments, strict=True)):
        visits = memory.plan.policy.visits(memory, segment)
        parts.append([None] * len(visits))
        for place, visit in enumerate(visits):
            shared.setdefault(id(visit.strand), []).append((index, place, visit))

    for visitors in shared.values():
        strand = visitors[0][2].strand
        whole = [v for v in visitors if len(visitors) > 1 and _sees_all(rows.segments[v[0]], v[2])]
        if len(whole) > 1:
            rows_of = [rows.segments[index].rows for index, _, _ in whole]
            queries = in_frame(strand.offset)
            stacked = strand.attend(torch.cat([queries[r] for r in rows_of]), 0, Everything())
            start = 0
            for (index, place, _), r in zip(whole, rows_of, strict=True):
                stop = start + r.stop - r.start
                parts[index][place] = Partial(stacked.out[start:stop], stacked.lse[start:stop])
                start = stop
        for index, place, visit in visitors:
            if parts[index][place] is None:
                segment = rows.segments[index]
                queries = in_frame(strand.offset)[segment.rows]
                parts[index][place] = strand.attend(queries, segment.position, segment.mask, visit.window)

    value_dim = v.shape[-1]
    outs = [
        merge_all([part for part in of_segment if part is not None]).out
        if of_segment
        else empty_partial(segment.length, heads.num_heads, value_dim, q.device).out
        for of_segment, segment in zip(parts, rows.segments, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Frames:
    """The queries of one layer, rotated once for each frame that is visited."""

    def __init__(self, heads: Heads, q: Tensor, rows: Rows) -> None:
        self.heads, self.q, self.rows = heads, q, rows
        self.rotated: dict[int, Tensor] = {}

    def __call__(self, offset: int) -> Tensor:
        if self.heads.rope is None:
            return self.q
        if offset not in self.rotated:
            angles = self.rows.angles(self.heads.rope, [offset] * len(self.rows.segments))
            self.rotated[offset] = rotate(self.q, angles)
        return self.rotated[offset]


def _sees_all(segment: Segment, visit: Visit) -> bool:
    """Whether every query of the segment sees every key of the strand."""
    strand = visit.strand
    view = segment.mask.view(
        segment.position, range(segment.length), strand.position, len(strand), visit.window
    )
    return view.visible is None and view.low == 0 and view.high == len(strand)
