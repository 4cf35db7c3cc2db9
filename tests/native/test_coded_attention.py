"""Native attention over strands in few bits: equal to the torch form, and one result for a query however it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_support import extension, isas, running, switched_off
from torch import Tensor

from plait.memory import Codec, FrozenStrand, Heads, MemoryPlan, Notes, Strand
from plait.memory.codecs import GEAR, Staircase, ThinK
from plait.memory.coded import CodedStrand
from plait.memory.codes import WIDTHS, AffineCodes, pack, unpack
from plait.ops import Causal, Everything, Mask, Partial, Tree, native
from plait.ops.coded import CodedForm, CodedNumbers, StoredNumbers, coded_attention

pytestmark = switched_off

# fp32 sums of some hundred terms in another order; a code is turned into a number by one rounding less.
TOLERANCE = 2e-5

GQA = Heads(9, 3, 64, scale=0.125)
# Nothing is a multiple of 8, and values are not as wide as keys.
ODD = Heads(4, 2, 38, scale=0.2, softcap=5.0, value_dim=21)
ONE = Heads(3, 3, 5, scale=0.5)

CASES: list[tuple[Heads, str]] = [
    *((GQA, f"gear:bits={bits},group=64") for bits in WIDTHS),
    *((ODD, f"gear:bits={bits},group=7,buffer=14,rank=3,sparsity=0.1") for bits in WIDTHS),
    (ODD, "gear:bits=4,backbone=kcvt,rank=17,factor_bits=8"),
    (GQA, "gear:bits=2,backbone=kcvt,rank=0,rank_decode=0,sparsity=0.3"),
    (ONE, "gear:bits=3,group=5,buffer=5,rank=2,factor_bits=8,sparsity=0"),
    (ONE, "gear:bits=4,backbone=kcvt,rank=0,rank_decode=0,sparsity=0"),
    (GQA, "saq:steps=rest@4"),
    (ODD, "saq:steps=rest@3,group=6"),
    (GQA, "think:ratio=0.4"),
    (GQA, "think:ratio=0.4,dense:dtype=bf16"),
    (ODD, "think:ratio=0.3,value_ratio=0.4,dense:dtype=fp16"),
    (GQA, "think:ratio=0.4,gear:bits=4"),
    (ODD, "think:ratio=0.5,value_ratio=0.2,gear:bits=3,group=16,buffer=16,rank=2,factor_bits=8"),
]
CASE = pytest.mark.parametrize(
    ("heads", "memory"), CASES, ids=[f"{heads.head_dim}-{memory}" for heads, memory in CASES]
)


def codec_of(heads: Heads, memory: str) -> Codec:
    codec = MemoryPlan.parse(memory).codec
    codec.check_heads(heads)
    return codec


def notes_of(codec: Codec, heads: Heads, strand: FrozenStrand) -> Notes | None:
    """What ThinK has noted by the end of a prompt."""
    if not isinstance(codec, ThinK):
        return None
    notes: Any = codec.new_notes()
    queries = torch.randn(8, heads.num_heads, heads.head_dim)
    notes.key_channels = codec._key_channels(queries, strand)
    if codec.value_ratio:
        notes.value_channels = codec._value_channels(queries, 10**6, strand)
    return notes


def coded(heads: Heads, memory: str, length: int, start: int = 7) -> Strand:
    """A strand in few bits of tokens with outliers and a common direction."""
    codec = codec_of(heads, memory)
    keys, values = (
        torch.randn(heads.num_kv_heads, length, size) * (1 + 4 * torch.rand(size))
        for size in (heads.head_dim, heads.value_dim or heads.head_dim)
    )
    strand = FrozenStrand(heads, keys, values, start=start)
    with torch.no_grad():
        return codec.encode(strand, notes_of(codec, heads, strand))


def in_torch(strand: Strand, q: Tensor, first_query: int, mask: Mask, window: int | None = None) -> Partial:
    """The same without the native form."""
    twin = strand.copied()
    part = twin
    while True:
        part._native = None  # type: ignore[attr-defined]
        if not hasattr(part, "inner"):
            break
        part = part.inner
        if isinstance(part, FrozenStrand):
            break
    return twin.attend(q, first_query, mask, window)


def queries(count: int, heads: Heads) -> Tensor:
    return torch.randn(count, heads.num_heads, heads.head_dim)


def assert_near(found: Partial, wanted: Partial) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE * 10, rtol=TOLERANCE)


def random_tree(count: int) -> Tree:
    return Tree([-1] + [int(torch.randint(0, node, ())) for node in range(1, count)])


@CASE
@pytest.mark.parametrize("length", [1, 300, 530])
def test_equals_the_torch_form(heads: Heads, memory: str, length: int) -> None:
    strand = coded(heads, memory, length)
    assert strand.native_form() is not None
    for count in (1, 5, 70):
        q = queries(count, heads)
        for mask in (Everything(), Causal(), random_tree(count)):
            for window in (None, 100):
                first = 7 + length
                assert_near(strand.attend(q, first, mask, window), in_torch(strand, q, first, mask, window))


@CASE
def test_a_query_within_the_strand_sees_what_lies_before_it(heads: Heads, memory: str) -> None:
    strand = coded(heads, memory, 300)
    q = queries(40, heads)
    for first in (0, 100, 290):
        for window in (None, 20):
            assert_near(
                strand.attend(q, first, Causal(), window), in_torch(strand, q, first, Causal(), window)
            )


@CASE
def test_parts_and_copies_of_a_strand_answer_together_as_the_whole(heads: Heads, memory: str) -> None:
    strand = coded(heads, memory, 600)
    q = queries(3, heads)
    wanted = in_torch(strand, q, 700, Causal())
    for at in (1, 255, 256, 333, 599):
        for parts in (strand.split(at), [part.copied() for part in strand.split(at)]):
            first, second = (part.attend(q, 700, Causal()) for part in parts)
            assert_near(native.merge(first, second), wanted)


@CASE
def test_a_row_has_the_same_bits_on_every_instruction_set_in_any_batch_and_on_any_threads(
    heads: Heads, memory: str
) -> None:
    strand = coded(heads, memory, 700)
    q = queries(67, heads)
    with running(isa="scalar", threads=1):
        wanted = strand.attend(q, 720, Causal())
    for isa in isas():
        for threads in (1, 2, 3):
            with running(isa=isa, threads=threads):
                for low, high in ((0, 67), (0, 1), (3, 7), (64, 67)):
                    found = strand.attend(q[low:high], 720 + low, Causal())
                    assert torch.equal(found.out, wanted.out[low:high])
                    assert torch.equal(found.lse, wanted.lse[low:high])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize(("num_heads", "width", "group"), [(1, 1, 1), (3, 64, 64), (2, 38, 4), (5, 24, 10)])
def test_every_code_becomes_its_number(bits: int, along: Any, num_heads: int, width: int, group: int) -> None:
    """One-hot weights read single values; what they read are the decoded numbers, to the last rounding."""
    channels, length = num_heads * width, 40
    codes = torch.randint(0, 2**bits, (length, channels), dtype=torch.uint8)
    matrix = AffineCodes.of(codes.float() * 0.37 - 1.5, bits, along, group)
    matrix = replace(matrix, codes=pack(codes, bits)).cut(3, length)
    values = matrix.native(num_heads)
    keys = torch.eye(length - 3)[None].expand(num_heads, -1, -1) * 400.0
    assert values is not None
    form = CodedForm(CodedNumbers.of(StoredNumbers.of_numbers(keys)), values, 0)
    q = torch.eye(length - 3)[:, None].expand(-1, num_heads, -1)
    found = coded_attention(q, form, length - 3, scale=1.0, value_dim=width)
    torch.testing.assert_close(found.out.flatten(1), matrix.rows(0, length - 3), atol=1e-6, rtol=1e-6)
    assert torch.equal(unpack(matrix.codes, bits, channels), codes[3:])


def test_a_nan_in_one_query_stays_in_its_row() -> None:
    strand = coded(GQA, "gear:bits=4", 300)
    q = queries(4, GQA)
    clean = strand.attend(q, 400, Causal())
    q[2, 4] = float("nan")
    found = strand.attend(q, 400, Causal())
    assert found.out[2, 4].isnan().all()
    found.out[2, 4], clean.out[2, 4] = 0.0, 0.0
    assert torch.equal(found.out, clean.out)


def test_a_query_that_sees_nothing_is_the_identity() -> None:
    for heads, memory in CASES:
        found = coded(heads, memory, 30).attend(queries(2, heads), 0, Causal())
        assert torch.equal(found.out, torch.zeros_like(found.out))
        assert bool((found.lse == -float("inf")).all())


@contextmanager
def refused(match: str) -> Iterator[None]:
    with pytest.raises(ValueError, match=match):
        yield


def test_wrong_arrays_are_refused() -> None:
    stored = extension().StoredNumbers
    codes, half = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 16).half()
    with refused("2, 3, 4 or 8 bits"):
        stored.affine(codes, half, half, 5, True, 4, 0, 2, 8)
    with refused("too short"):
        stored.affine(codes, half, half, 8, True, 4, 0, 2, 8)
    with refused("scale and minimum must have shape"):
        stored.affine(codes, half, half, 4, True, 4, 0, 2, 8)
    with refused("1 to 1024 channels"):
        stored.plain(torch.zeros(1, 2, 1025))
    numbers = extension().CodedNumbers(stored.plain(torch.zeros(2, 4, 8)))
    with refused("channels of a head"):
        numbers.thinned(torch.full((2, 8), 8, dtype=torch.int16), 8, None)
    one = torch.zeros(1, dtype=torch.int16)
    for starts, channels in (([0, 1, 0], one), ([0, 1, 1], one + 8), ([0, 0, 0], one)):
        with refused("Outliers need"):
            numbers.set_outliers(
                torch.tensor(starts, dtype=torch.int32), one.byte(), channels, torch.zeros(1).half()
            )
    with refused("tokens of each in order"):
        numbers.set_outliers(
            torch.tensor([0, 2, 2], dtype=torch.int32),
            torch.tensor([1, 0], dtype=torch.uint8),
            torch.zeros(2, dtype=torch.int16),
            torch.zeros(2).half(),
        )
    with refused("low-rank"):
        numbers.set_factor(stored.plain(torch.zeros(2, 3, 1)), torch.zeros(2, 8, 1).half())
    out, lse = torch.zeros(1, 2, 8), torch.zeros(1, 2)
    with refused("not stored"):
        extension().coded_attention(
            torch.zeros(1, 2, 8), numbers, numbers, 2, 3, 1.0, 0, 0, 0, 0, 0.0, None, None, out, lse
        )


def test_the_bits_of_every_codec_are_those_that_are_read() -> None:
    """A strand that is relocated, as to a file, is read from its new place."""
    for heads, memory in CASES:
        strand = coded(heads, memory, 300)
        q = queries(2, heads)
        wanted = strand.attend(q, 400, Causal())
        elsewhere = strand.relocated(torch.clone)
        assert {t.data_ptr() for t in elsewhere.tensors()}.isdisjoint(t.data_ptr() for t in strand.tensors())
        for tensor in strand.tensors():
            tensor.zero_()
        found = elsewhere.attend(q, 400, Causal())
        assert torch.equal(found.out, wanted.out), memory


def test_the_cases_cover_every_codec_that_has_a_form() -> None:
    codecs = {type(MemoryPlan.parse(memory).codec) for _, memory in CASES}
    assert codecs == {GEAR, Staircase, ThinK}
    assert isinstance(coded(GQA, "saq:steps=rest@4", 64), CodedStrand)
