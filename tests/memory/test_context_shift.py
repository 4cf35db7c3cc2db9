"""Shifting a context in the three ways that go wrong elsewhere, beside moving its strands.

The truth is attention in float64 over the numbers that are stored, rotated exactly for the new positions:
what re-encoding the same strands at their new places would give. Each wrong form is the arithmetic that
caches with one frame for all keys use.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from memory_oracle import GROUPED, TokenTable, assert_equal_to, ids_of, new_memory, turned
from torch import Tensor

from plait.memory import DenseStrand, FrozenStrand, Memory, Strand
from plait.ops import Mask, Partial, rotate

TABLE = TokenTable(GROUPED)
ROPE = GROUPED.rope
assert ROPE is not None
QUERY = [5, 6]


def codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rounded numbers and one scale for each head and token."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dim=-1, keepdim=True) / top
    return (x / scale).round().to(torch.int8), scale


class CodedStrand(Strand):
    """Rotated keys as low-bit codes, the values as they are."""

    def __init__(self, keys: Tensor, values: Tensor, bits: int) -> None:
        self.heads, self.offset, self.start = GROUPED, 0, 0
        self.bits, self.values = bits, values
        self.codes, self.scales = codes(keys, bits)

    def __len__(self) -> int:
        return self.codes.shape[1]

    @property
    def keys(self) -> Tensor:
        return self.codes * self.scales

    def attend(self, q: Tensor, first_query: int, mask: Mask, window: int | None = None) -> Partial:
        plain = FrozenStrand(GROUPED, self.keys, self.values, offset=self.offset, start=self.start)
        return plain.attend(q, first_query, mask, window)

    def split(self, at: int) -> tuple[CodedStrand, CodedStrand]:
        front, back = copy.copy(self), copy.copy(self)
        for piece, part in ((front, slice(0, at)), (back, slice(at, None))):
            piece.codes, piece.scales, piece.values = (
                self.codes[:, part],
                self.scales[:, part],
                self.values[:, part],
            )
        back.start += at
        return front, back

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scales, self.values]


def coded(ids: Sequence[int], bits: int) -> CodedStrand:
    _, k, v = TABLE.rows(ids)
    keys = rotate(k, ROPE.angles(torch.arange(len(ids))))
    return CodedStrand(keys.transpose(0, 1), v.transpose(0, 1), bits)


def behind(strands: Sequence[Strand], position: int) -> Tensor:
    """Outputs of two queries that stand behind strands."""
    memory = new_memory()
    memory.strands, memory.tail = list(strands), DenseStrand(GROUPED, start=position)
    return memory.attend(*TABLE.rows(QUERY))


def truth(parts: Sequence[tuple[Tensor, Tensor, Sequence[int], Sequence[int]]], position: int) -> Tensor:
    """Float64 attention over stored keys (G, T, D), unrotated from their old positions, at new ones."""
    keys, values = [], []
    for stored, value, old, new in parts:
        unturned = turned(stored.transpose(0, 1), [-place for place in old], GROUPED)
        keys.append(turned(unturned, new, GROUPED))
        values.append(value.transpose(0, 1).double())
    q, k, v = TABLE.rows(QUERY)
    places = [position, position + 1]
    keys.append(turned(k, places, GROUPED))
    values.append(v.double())
    queries = turned(q, places, GROUPED)
    all_keys, all_values = (torch.cat(part).repeat_interleave(2, dim=1) for part in (keys, values))
    scores = torch.einsum("qhd,thd->hqt", queries, all_keys) * GROUPED.scale
    scores[:, 0, -1] = -torch.inf
    return torch.einsum("hqt,thv->qhv", scores.softmax(dim=-1), all_values)


def wrong_by(given: Tensor, wanted: Tensor) -> float:
    return float((given.double() - wanted).abs().max())


@pytest.mark.parametrize("bits", [4, 8])
def test_shifting_codes_again_and_again_drifts_and_moving_them_does_not(bits: int) -> None:
    strand = coded(ids_of(200), bits)
    dropped, step = 8, 1
    kept, shifted = strand.split(dropped)[1], strand.split(dropped)[1]
    naive_errors, own_errors = [], []
    for number in range(1, 65):
        # A cache with one frame turns the keys back and forth at every shift, and rounds them each time.
        by = -step if number % 2 else step
        shifted.codes, shifted.scales = codes(rotate(shifted.keys, ROPE.angles(torch.tensor([by]))), bits)
        shifted.start += by
        kept = kept.moved(by)
        if number in (2, 64):
            wanted = truth([(kept.keys, kept.values, range(8, 200), range(8, 200))], 200)
            naive_errors.append(wrong_by(behind([shifted], 200), wanted))
            own_errors.append(wrong_by(behind([kept], 200), wanted))
    assert max(own_errors) < 1e-5
    assert naive_errors[0] > 100 * max(own_errors)
    assert naive_errors[1] > naive_errors[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_dropping_the_middle_with_old_rotations_is_wrong_and_with_frames_it_is_exact(bits: int) -> None:
    strand = coded(ids_of(120), bits)
    front, rest = strand.split(10)
    back = rest.split(70)[1]
    wanted = truth(
        [
            (front.keys, front.values, range(10), range(10)),
            (back.keys, back.values, range(80, 120), range(10, 50)),
        ],
        50,
    )
    assert_equal_to(behind([front, back.moved(-70)], 50), wanted)
    stale = copy.copy(back)
    # The cell is given a new position; its key still carries the old one.
    stale.start = 10
    assert wrong_by(behind([front, stale], 50), wanted) > 0.05


def test_chunks_in_another_order_are_exact_with_frames_and_wrong_where_keys_are_reused_as_they_are() -> None:
    strand = coded(ids_of(120), 4)
    first, rest = strand.split(50)
    second, third = rest.split(40)
    order = [(third, 90, 0, 30), (first, 0, 30, 50), (second, 50, 80, 40)]
    wanted = truth(
        [
            (piece.keys, piece.values, range(old, old + count), range(new, new + count))
            for piece, old, new, count in order
        ],
        120,
    )
    moved = [piece.moved(new - old) for piece, old, new, _ in order]
    assert_equal_to(behind(moved, 120), wanted)
    reused = [copy.copy(piece) for piece, *_ in order]
    for piece, (_, _, new, _) in zip(reused, order, strict=True):
        piece.start = new
    assert wrong_by(behind(reused, 120), wanted) > 0.05


def test_a_memory_of_codes_is_edited_in_place() -> None:
    """The same through `splice`, with tokens inserted in the middle."""
    source = new_memory()
    strand = coded(ids_of(120), 4)
    source.strands, source.tail = [strand], DenseStrand(GROUPED, start=120)
    memory: Memory = source.fork()
    memory.truncate(30)
    middle = ids_of(7, seed=3)
    TABLE.write(memory, middle)
    memory.splice(source, 50, 120, materialise=True)
    front, back = strand.split(30)[0], strand.split(50)[1]
    _, k, v = TABLE.rows(middle)
    new = rotate(k, ROPE.angles(torch.arange(30, 37))).transpose(0, 1)
    wanted = truth(
        [
            (front.keys, front.values, range(30), range(30)),
            (new, v.transpose(0, 1), range(30, 37), range(30, 37)),
            (back.keys, back.values, range(50, 120), range(37, 107)),
        ],
        107,
    )
    assert_equal_to(memory.attend(*TABLE.rows(QUERY)), wanted)
    (moved,) = [strand for strand in memory.strands if strand.position == 37]
    assert isinstance(moved, CodedStrand)
    assert moved.codes.data_ptr() == back.codes.data_ptr()
