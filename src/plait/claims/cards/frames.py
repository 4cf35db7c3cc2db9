"""A strand can be moved without touching its keys: the query is rotated instead.

Shapes: Q queries, T keys, H heads, D head size.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from torch import Tensor

    from plait.ops import Rope

__all__ = ["CLAIM"]

_MAX_POSITION, _MAX_MOVE = 8192, 4096


def _error(rope: Rope, q: Tensor, k: Tensor, v: Tensor, start: int, by: int, first_query: int) -> float:
    """Largest difference of the attention output between moving a strand and writing its keys anew.

    Args:
        rope: turning speeds.
        q: (Q, H, D) and k, v: (T, H, D), not rotated.
        start: position at which the strand was written.
        by: how far it is moved.
        first_query: position of the first query.
    """
    import torch

    from plait.memory import DenseStrand, Heads
    from plait.ops import Everything, rotate

    num_keys, num_heads, head_dim = k.shape
    heads = Heads(num_heads, num_heads, head_dim, scale=head_dim**-0.5, rope=rope)
    queries = torch.arange(first_query, first_query + q.shape[0])

    def strand_at(position: int) -> DenseStrand:
        strand = DenseStrand(heads, start=position)
        strand.append(rotate(k, rope.angles(torch.arange(position, position + num_keys))), v)
        return strand

    moved, written = strand_at(start).moved(by), strand_at(start + by)
    outs = [
        strand.attend(rotate(q, rope.angles(queries - strand.offset)), first_query, Everything()).out
        for strand in (moved, written)
    ]
    return float((outs[0] - outs[1]).abs().max())


def _measure(run: Run) -> Measurements:
    import torch

    from plait.nn.rotary import base_frequencies
    from plait.ops import Rope

    random = torch.Generator().manual_seed(run.seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    rounds = run.pick(500, 20)
    errors: dict[torch.dtype, list[float]] = {torch.float64: [], torch.float32: []}
    for number in range(rounds):
        if number % max(1, rounds // 10) == 0:
            yield f"{number} of {rounds} moves"
        head_dim, num_keys, num_queries = 64, 128, 4
        # The two largest moves at the last position come first: they are the hardest.
        by = (_MAX_MOVE, -_MAX_MOVE)[number] if number < 2 else draw(-_MAX_MOVE, _MAX_MOVE)
        last = _MAX_POSITION if number < 2 else draw(max(num_keys, num_keys - by), _MAX_POSITION)
        start = last - num_keys
        first_query = start + by + num_keys + draw(0, 1024)
        q, k, v = (torch.randn(n, 4, head_dim, generator=random) for n in (num_queries, num_keys, num_keys))
        rope = Rope(base_frequencies(10_000.0, head_dim))
        for dtype in errors:
            errors[dtype].append(
                _error(dataclasses.replace(rope, dtype=dtype), q, k, v, start, by, first_query)
            )
    return {
        "max_error": Quantity.largest(errors[torch.float64], ""),
        "max_error_of_fp32_angles": Quantity.largest(errors[torch.float32], ""),
    }


CLAIM = Claim(
    name="frames",
    title="A strand has its own frame of positions",
    headline="Moving remembered tokens costs nothing on the keys: rotating the query equals writing the keys anew.",
    scale=(
        "500 strands of 128 tokens at positions up to 8,192, moved by -4,096 to 4,096; 4 heads of size 64, rotary "
        "base 10,000, fp32. Beside it, the same with angles formed in fp32, as is usual."
    ),
    bars=(
        Bar(
            quantity="max_error",
            relation="<=",
            value=1e-5,
            unit="",
            why="Outputs are about 1; fp32 keys, queries and sums round to about 1e-6.",
        ),
    ),
    measure=_measure,
)
