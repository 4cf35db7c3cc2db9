"""A strand comes out of a file as it went in, and strands of one form share all but their numbers."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.errors import CapacityError
from plait.memory import FrozenStrand, Heads, MemoryPlan, Strand, spill
from plait.memory.spill import SpilledRows, SpilledStrands, SpillFile
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
    # Tensors begin at multiples of 64 bytes, and codes are described behind them.
    assert all(size <= one.nbytes <= size + 64 * 20 + 1024 for size, one in zip(sizes, stored, strict=True))


@pytest.mark.parametrize("spec", CODECS)
def test_native_code_reads_a_strand_where_the_file_is_mapped(spec: str) -> None:
    store = SpillFile()
    layouts = []
    for start in (5, 37):
        strand = strand_of(spec, 32, start, torch.randn(2, 2, 48, 16))
        stored = store.put(strand)
        place, wanted = stored.place, strand.place
        if place is None or wanted is None:
            # Kept channels and their means are of the layer, and stand in no file.
            assert place is None
            assert wanted is None or "think" in spec
            return
        assert place[-2:] == wanted[-2:] == (3 + start, 32)
        assert place[2:9] == wanted[2:9]
        first = stored.file.address(stored.where)
        assert all(first <= address < first + stored.nbytes for address in place[:2])
        layouts.append(tuple(address - first for address in place[:2]))
        mapped = stored.mapped()
        assert mapped.data_ptr() == first
        assert torch.equal(
            mapped[: strand.tensors()[0].nbytes].view(strand.tensors()[0].dtype),
            strand.tensors()[0].flatten(),
        )
        # What has left memory is read again.
        stored.rest()
        assert torch.equal(mapped, store.read(stored.where, stored.nbytes))
    assert layouts[0] == layouts[1]


def test_strands_that_do_not_fit_together_are_mapped_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_FIRST_MAPPED", 1 << 14)
    monkeypatch.setattr(spill, "_MOST_MAPPED", 1 << 15)
    store = SpillFile()
    numbers = [torch.randn(2, 2, length, 16) for length in (8, 60, 200, 8, 100, 8)]
    stored = [store.put(FrozenStrand(HEADS, *each)) for each in numbers]
    assert len(store._mapped) > 2
    for one, (keys, values) in zip(stored, numbers, strict=True):
        assert torch.equal(one.mapped()[: keys.nbytes].view(torch.float32).view(keys.shape), keys)
        assert torch.equal(one.load().tensors()[1], values)


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


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "truncate", "fork"]), st.integers(0, 40), st.integers(0, 3)),
        max_size=120,
    )
)
def test_rows_in_a_file_are_those_of_a_list(steps: list[tuple[str, int, int]]) -> None:
    file = SpillFile()
    pairs: list[tuple[SpilledRows, list[list[int]]]] = [(SpilledRows(file), [])]
    for number, (step, value, which) in enumerate(steps):
        rows, wanted = pairs[which % len(pairs)]
        if step == "append":
            rows.append(torch.tensor([number, value]))
            wanted.append([number, value])
        elif step == "truncate":
            rows.truncate(value)
            del wanted[value:]
        else:
            pairs.append((rows.fork(), list(wanted)))
        assert all(found.numbers.tolist() == kept for found, kept in pairs)
        assert not any(found.tensors() for found, _ in pairs)


def test_many_strands_take_no_memory_each() -> None:
    strands = SpilledStrands(SpillFile())
    numbers = [torch.randn(2, 2, length, 16) for length in (8, 32, 8, 8)]
    for start, each in enumerate(numbers):
        strands.append(FrozenStrand(HEADS, *each).restarted(start))
    twin = strands.copy()
    del strands[2:]
    strands.append(FrozenStrand(HEADS, *numbers[1]))
    assert (len(strands), len(twin)) == (3, 4)
    for held, order in ((strands, (0, 1, 1)), (twin, (0, 1, 2, 3))):
        for one, again, number in zip(held, held[:], order, strict=True):
            assert one == again
            assert torch.equal(one.load().tensors()[0], numbers[number][0])
    assert [one.start for one in twin] == [0, 1, 2, 3]
    with pytest.raises(IndexError, match="Only the last strands"):
        del twin[1:2]


def test_a_full_disk_leaves_rows_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = SpilledRows(SpillFile())
    for number in range(16):
        rows.append(torch.tensor([number]))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(CapacityError, match="No room on disk"):
            rows.append(torch.tensor([16]))
    assert rows.numbers.flatten().tolist() == list(range(16))
    rows.append(torch.tensor([16]))
    assert rows.numbers.flatten().tolist() == list(range(17))
