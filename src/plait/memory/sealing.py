"""How a codec comes by the tokens that it stores: the oldest of those that are still plain numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from plait.memory.strand import DenseStrand, FrozenStrand

if TYPE_CHECKING:
    from plait.memory.memory import Memory
    from plait.memory.plan import Codec

__all__ = ["plain_run", "seal_oldest", "taken"]


def plain_run(memory: Memory, exact_first: int = 0) -> list[FrozenStrand]:
    """The strands at the end of a memory whose tokens are plain numbers, in one frame; the tail is the last.

    A fork leaves plain strands before the tail; they are part of it. Strands of a moved frame, and those
    before a gap that a policy made, are not; nor are those that a codec that drops tokens must keep apart.

    Args:
        exact_first: tokens of the sequence before this position are left out.
    """
    if memory.plan.codec.drops_tokens:
        exact_first = max(exact_first, memory.apart_from)
    run: list[FrozenStrand] = [memory.tail]
    for strand in reversed(memory.strands):
        begin = run[0].position
        if not isinstance(strand, FrozenStrand) or begin <= exact_first:
            break
        if strand.offset != memory.tail.offset or strand.position + len(strand) != begin:
            break
        run.insert(0, strand)
    return run


def taken(run: list[FrozenStrand], low: int, high: int) -> FrozenStrand:
    """Tokens [low, high) of a run of strands as one strand; not a copy where one strand holds them all."""
    pieces: list[FrozenStrand] = []
    start = 0
    for strand in run:
        first, last = max(low - start, 0), min(high - start, len(strand))
        if first < last or (strand is run[-1] and not pieces):
            pieces.append(strand.split(last)[0].split(first)[1])
        start += len(strand)
    if len(pieces) == 1:
        return pieces[0]
    keys = torch.cat([piece.keys for piece in pieces], dim=1)
    values = torch.cat([piece.values for piece in pieces], dim=1)
    return FrozenStrand(pieces[0].heads, keys, values, offset=pieces[0].offset, start=pieces[0].start)


def seal_oldest(memory: Memory, codec: Codec) -> None:
    """Store the tokens that a codec says are ready; those that are not go to a new tail."""
    run = plain_run(memory, codec.exact_first)
    length = sum(map(len, run))
    exact = min(max(codec.exact_first - run[0].position, 0), length)
    count = codec.ready(length - exact)
    if count == 0:
        return
    before = memory.strands[: len(memory.strands) - len(run) + 1]
    # What is kept must be usable outside inference mode too.
    with torch.inference_mode(False), torch.no_grad():
        if exact:
            before.append(taken(run, 0, exact).copied())
        stored = codec.encode(taken(run, exact, exact + count), memory.codec_notes)
        rest = taken(run, exact + count, length)
        tail = DenseStrand(
            memory.heads, offset=rest.offset, start=rest.start, dtype=rest.keys.dtype, device=rest.keys.device
        )
        tail.append(rest.keys.transpose(0, 1), rest.values.transpose(0, 1))
    memory.strands = [*before, stored]
    memory.tail = tail
