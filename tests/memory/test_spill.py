"""A strand comes out of a file as it went in, and strands of one form share all but their numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plait.memory import FrozenStrand, Heads, MemoryPlan, Strand
from plait.memory.spill import SpillFile
from plait.ops import Causal, Rope

HEADS = Heads(4, 2, 16, scale=0.25, rope=Rope(torch.tensor([1.0, 0.3, 0.1, 0.03])))
CODECS = [
    "dense",
    "dense:dtype=bf16",
    "gear:bits=4,group=8,buffer=8",
    "gear:bits=2,backbone=kcvt,factor_bits=8,sparsity=0",
    "saq:group=8",
    "think:ratio=0.4",
    "think:ratio=0.4,gear:bits=3,group=2,buffer=8",
]


def strand_of(spec: str, length: int, start: int, numbers: Tensor) -> Strand:
    codec = MemoryPlan.parse(spec).codec
    plain = FrozenStrand(HEADS, *numbers[:, :, :length], offset=3, start=start)
    with torch.no_grad():
        return codec.encode(plain, codec.new_notes())


@pytest.mark.parametrize("spec", CODECS)
def test_strands_come_back_bit_for_bit_and_share_one_outline(spec: str) -> None:
    numbers = [torch.randn(2, 2, 48, 16) for _ in range(4)]
    strands = [strand_of(spec, 32, start, each) for start, each in zip((5, 37, 69), numbers, strict=False)]
    strands.append(strand_of(spec, 48, 101, numbers[3]))
    q = torch.randn(6, 4, 16)
    wanted = [strand.attend(q, 200, Causal()) for strand in strands]
    store = SpillFile()
    stored = [store.put(strand) for strand in strands]
    # A strand that has been read has found out more of itself than one that has not.
    assert store.put(strands[0]).outline is stored[0].outline
    sizes = [strand.nbytes() for strand in strands]
    for strand in strands:
        for tensor in strand.tensors():
            tensor.zero_()
    for strand, before, one in zip(strands, wanted, stored, strict=True):
        found = one.load()
        assert type(found) is type(strand)
        assert (found.offset, found.start, len(found)) == (3, strand.start, len(strand))
        assert all(map(torch.equal, found.attend(q, 200, Causal()), before))
        first, second = (part.attend(q, 200, Causal()) for part in found.split(len(found) // 2))
        assert torch.allclose(torch.logaddexp(first.lse, second.lse), before.lse, atol=1e-5)
    assert stored[1].outline is stored[0].outline is stored[2].outline
    assert stored[3].outline is not stored[0].outline
    # Tensors begin at multiples of 64 bytes.
    assert all(size <= one.nbytes <= size + 64 * 20 for size, one in zip(sizes, stored, strict=True))


def test_strands_of_another_geometry_are_another_form() -> None:
    store = SpillFile()
    numbers = torch.randn(2, 2, 32, 16)
    rope = Rope(torch.tensor([1.0, 0.3, 0.1, 0.04]))
    other = Heads(4, 2, 16, scale=0.25, rope=rope)
    mine, theirs = (store.put(FrozenStrand(heads, *numbers)) for heads in (HEADS, other))
    assert mine.outline is not theirs.outline
    assert theirs.load().heads.rope is rope


def test_what_is_read_from_a_file_can_be_changed_without_changing_the_file() -> None:
    store = SpillFile()
    stored = store.put(FrozenStrand(HEADS, *torch.randn(2, 2, 32, 16)))
    first = stored.load()
    before = first.tensors()[0].clone()
    first.tensors()[0].zero_()
    assert torch.equal(stored.load().tensors()[0], before)
