"""The staircase gives every group the bits of its age, however the tokens came, and never codes from an original."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import GROUPED, TokenTable, ids_of, new_memory

from plait.errors import ConfigError
from plait.memory import FrozenStrand, Memory
from plait.memory.codecs import Staircase, staircase
from plait.memory.coded import CodedStrand
from plait.memory.codes import AffineCodes

EXAMPLES = settings(deadline=None, max_examples=60, derandomize=True)
TABLE = TokenTable(GROUPED)
GROUP = 4
SPECS = {
    "saq:steps=4@16/8@8/8@4/rest@2,group=4": [(4, 16), (12, 8), (20, 4)],
    "saq:steps=8@8/rest@3,group=4": [(8, 8)],
    "saq:steps=8@16/4@4/rest@2,group=4,sink=8@8": [(8, 16), (12, 4)],
}
LAST = {"saq:steps=4@16/8@8/8@4/rest@2,group=4": 2, "saq:steps=8@8/rest@3,group=4": 3}


def bits_by_position(memory: Memory) -> list[int]:
    """Bits of every token, oldest first."""
    bits: list[int] = []
    for strand in memory.all_strands():
        width = strand.keys.bits if isinstance(strand, CodedStrand) else 16  # type: ignore[attr-defined]
        bits += [width] * len(strand)
    return bits


def promised(spec: str, length: int) -> list[int]:
    """What the steps say for `length` tokens."""
    steps = SPECS[spec]
    free = steps[0][0] if steps[0][1] == 16 else 0
    coded = max(length - free, 0) // GROUP * GROUP
    bits = []
    for position in range(coded):
        newer = coded - (position // GROUP + 1) * GROUP
        age = free + newer
        width = next((width for border, width in steps if age < border), LAST.get(spec, 2))
        bits.append(max(width, 8) if "sink" in spec and position < 8 else width)
    return bits + [16] * (length - coded)


def stored(memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all tokens as numbers."""
    strands = [s.dense() if isinstance(s, CodedStrand) else s for s in memory.all_strands()]
    assert all(isinstance(strand, FrozenStrand) for strand in strands)
    keys = torch.cat([strand.keys.float() for strand in strands], dim=1)  # type: ignore[attr-defined]
    values = torch.cat([strand.values.float() for strand in strands], dim=1)  # type: ignore[attr-defined]
    return keys, values


@pytest.mark.parametrize("spec", SPECS)
@EXAMPLES
@given(chunks=st.lists(st.integers(1, 25), min_size=1, max_size=8), full=st.sampled_from([6, 16, 1024]))
def test_bits_follow_age_and_numbers_do_not_depend_on_the_chunks(
    spec: str, chunks: list[int], full: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staircase, "_FULL", full)
        ids = ids_of(sum(chunks))
        in_parts, one_by_one = new_memory(spec=spec), new_memory(spec=spec)
        start = 0
        for size in chunks:
            TABLE.write(in_parts, ids[start : start + size])
            start += size
            assert bits_by_position(in_parts) == promised(spec, start)
        TABLE.write(one_by_one, ids, range(1, len(ids)))
        assert bits_by_position(one_by_one) == promised(spec, len(ids))
        for given_numbers, wanted in zip(stored(in_parts), stored(one_by_one), strict=True):
            assert torch.equal(given_numbers, wanted)


def test_sixteen_bits_alone_are_fp16() -> None:
    ids = ids_of(60)
    given_out = TABLE.write(new_memory(spec="saq:steps=rest@16,group=4"), ids, [20])
    assert torch.equal(given_out, TABLE.write(new_memory(spec="dense:dtype=fp16"), ids, [20]))


@pytest.mark.parametrize("widths", [(8, 4, 2), (8, 3), (4, 2)])
def test_an_error_is_at_most_the_sum_of_half_the_steps(widths: tuple[int, ...]) -> None:
    steps = "/".join([*(f"4@{width}" for width in widths[:-1]), f"rest@{widths[-1]}"])
    memory = new_memory(spec=f"saq:steps={steps},group=4")
    plain = new_memory(spec="dense:dtype=fp16")
    ids = ids_of(40)
    for one in (memory, plain):
        TABLE.write(one, ids, range(1, 40))
    given_keys, given_values = stored(memory)
    for given_numbers, exact, axis in (
        (given_keys, plain.tail.keys.float(), 1),
        (given_values, plain.tail.values.float(), 2),
    ):
        groups = exact.unflatten(axis, (-1, 4))
        if axis == 2:
            # Two heads of 8 channels are four groups of 4.
            assert groups.shape[2:] == (2, 4)
        span = groups.amax(axis + 1, keepdim=True) - groups.amin(axis + 1, keepdim=True)
        # Each coding may widen the span by one half step at both ends, and by the rounding to fp16.
        error, bound = torch.zeros_like(span), torch.zeros_like(span)
        for width in widths:
            error = (span + 2 * bound + 0.02) / (2**width - 1) / 2
            bound = bound + error
        off = (given_numbers - exact).abs().unflatten(axis, (-1, 4))
        assert bool((off <= bound * 1.001).all())


def test_bytes_are_those_of_the_tensors_and_fall_with_age() -> None:
    spec = "saq:steps=4@16/8@8/8@4/rest@2,group=4"
    memory = new_memory(spec=spec)
    TABLE.write(memory, ids_of(60), range(1, 60))
    for strand in memory.strands:
        assert isinstance(strand, CodedStrand)
        tokens, bits = len(strand), _codes(strand).bits
        codes = tokens * 16 * bits // 8
        scales = 2 * 2 * (tokens // 4 * 16 + tokens * 4)
        assert strand.nbytes() == 2 * codes + scales
    assert memory.nbytes() == sum(s.nbytes() for s in memory.strands) + memory.tail.nbytes()


def test_a_group_is_coded_once_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    coded: list[int] = []
    honest = AffineCodes.of

    def counted(matrix: torch.Tensor, bits: int, along: str, group: int) -> AffineCodes:
        coded.extend([bits] * (len(matrix) // group))
        return honest(matrix, bits, along, group)  # type: ignore[arg-type]

    monkeypatch.setattr(AffineCodes, "of", counted)
    memory = new_memory(spec="saq:steps=4@16/8@8/rest@4,group=4")
    TABLE.write(memory, ids_of(60), range(1, 60))
    # Keys and values of 14 groups came to 8 bits, and all but the newest two of them to 4.
    assert (coded.count(8), coded.count(4)) == (28, 24)


def test_forks_and_truncation_leave_shared_strands_alone() -> None:
    memory = new_memory(spec="saq:steps=4@16/8@8/rest@2,group=4")
    ids = ids_of(43)
    TABLE.write(memory, ids, [20])
    twin = memory.fork()
    before = [numbers.clone() for numbers in stored(twin)]
    TABLE.write(memory, ids_of(20, seed=1), [3, 9])
    memory.truncate(18)
    TABLE.write(memory, ids_of(30, seed=2), [1])
    assert all(torch.equal(a, b) for a, b in zip(before, stored(twin), strict=True))
    assert len(bits_by_position(memory)) == len(memory) == 48
    # The cut left an odd group, which is never joined to what follows.
    assert all(torch.isfinite(numbers).all() for numbers in stored(memory))
    widths = bits_by_position(memory)
    assert widths == sorted(widths[:16]) + widths[16:]


def test_a_full_strand_is_shared_by_forks_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staircase, "_FULL", 16)
    memory = new_memory(spec="saq:steps=4@16/rest@4,group=4")
    TABLE.write(memory, ids_of(60), range(1, 60))
    twin = memory.fork()
    TABLE.write(memory, ids_of(40, seed=1), range(1, 40))
    assert [len(strand) for strand in memory.strands][:3] == [16, 16, 16]
    assert [a is b for a, b in zip(memory.strands[:3], twin.strands[:3], strict=True)] == [True] * 3


def test_bad_numbers_and_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Staircase.group must divide the 16 value channels .* Got 64"):
        new_memory(spec="saq")
    memory = new_memory(spec="saq:steps=4@16/rest@4,group=4")
    q, k, v = TABLE.rows(ids_of(20))
    k[3] = float("nan")
    memory.attend(q, k, v)
    with pytest.raises(ConfigError, match=r"saq cannot store keys that are NaN"):
        memory.commit()


def test_the_typed_object_equals_its_text() -> None:
    assert new_memory(spec="saq:group=8,sink=8@8").plan.codec == Staircase(group=8, sink="8@8")


def _codes(strand: CodedStrand) -> AffineCodes:
    assert isinstance(strand.keys, AffineCodes)
    return strand.keys
