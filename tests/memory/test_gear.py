"""GEAR stores what its parts promise, in the bytes that it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import GROUPED, TokenTable, assert_equal_to, ids_of, new_memory

from plait.errors import ConfigError
from plait.memory import DenseStrand, Everything, FrozenStrand, Heads, Memory, MemoryPlan, allocated_bytes
from plait.memory.codecs import GEAR
from plait.memory.coded import BLOCK, CodedStrand

EXAMPLES = settings(deadline=None, max_examples=40, derandomize=True)
HEADS = Heads(6, 2, 16, scale=0.25, value_dim=8)
KIVI = GEAR(bits=4, group=8, buffer=16, rank=3, rank_decode=2, sparsity=0.1)
FORMS = [
    KIVI,
    GEAR(bits=4, backbone="kcvt", buffer=16, rank=3, rank_decode=2, sparsity=0.1),
    dataclasses.replace(KIVI, bits=2, sparsity=0.0),
    dataclasses.replace(KIVI, bits=3, rank=0, rank_decode=0),
    dataclasses.replace(KIVI, bits=8, factor_bits=8),
]
FORM = pytest.mark.parametrize("form", FORMS, ids=str)


def backbone_of(form: GEAR) -> GEAR:
    """The codes alone."""
    return dataclasses.replace(form, rank=0, rank_decode=0, sparsity=0.0)


def tokens(length: int, heads: Heads = HEADS, seed: int = 0) -> FrozenStrand:
    """Tokens with a common direction, channels of their own size and a few outliers, as real keys have."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(size: int) -> torch.Tensor:
        noise = torch.randn(heads.num_kv_heads, length, size, generator=generator)
        common = torch.randn(heads.num_kv_heads, length, 1, generator=generator)
        wide = common * torch.randn(heads.num_kv_heads, 1, size, generator=generator) + noise * 0.3
        wide = wide * (1 + 3 * torch.rand(size, generator=generator))
        spikes = torch.rand(wide.shape, generator=generator) < 0.02
        return torch.where(spikes, wide * 6, wide)

    return FrozenStrand(heads, numbers(heads.head_dim), numbers(heads.value_dim or heads.head_dim), start=5)


def queries(length: int, heads: Heads = HEADS, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, heads.num_heads, heads.head_dim, generator=generator)


def errors(form: GEAR, strand: FrozenStrand) -> list[float]:
    """Relative error of keys and values."""
    dense = form.encode(strand, None).dense()
    pairs = ((dense.keys, strand.keys), (dense.values, strand.values))
    return [float((given - exact).norm() / exact.norm()) for given, exact in pairs]


@FORM
@pytest.mark.parametrize("length", [1, 16, 40, 2 * BLOCK + 40])
def test_reading_in_parts_equals_attention_over_the_decoded_tokens(form: GEAR, length: int) -> None:
    coded = form.encode(tokens(length), None)
    q = queries(4)
    given, wanted = (strand.attend(q, 5 + length, Everything()) for strand in (coded, coded.dense()))
    assert_equal_to(given.out, wanted.out, 1e-4)
    assert_equal_to(given.lse, wanted.lse, 1e-4)


@FORM
@EXAMPLES
@given(length=st.integers(2, 300), seed=st.integers(0, 99))
def test_repairs_never_make_the_error_larger(form: GEAR, length: int, seed: int) -> None:
    strand = tokens(length, seed=seed)
    for given_error, alone in zip(errors(form, strand), errors(backbone_of(form), strand), strict=True):
        assert given_error <= alone + 1e-3


def test_each_part_helps_on_keys_with_outliers_and_a_common_direction() -> None:
    strand = tokens(256)
    alone, low_rank, sparse, both = (
        errors(dataclasses.replace(KIVI, bits=2, rank=rank, sparsity=sparsity), strand)
        for rank, sparsity in ((0, 0.0), (3, 0.0), (0, 0.15), (3, 0.15))
    )
    for part in range(2):
        assert both[part] < min(low_rank[part], sparse[part]) < alone[part]


@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
def test_outliers_are_exact_to_fp16(part: int) -> None:
    strand = tokens(200)
    dense = dataclasses.replace(KIVI, bits=2, sparsity=0.15).encode(strand, None).dense()
    pairs = ((strand.keys, dense.keys), (strand.values, dense.values))
    exact, stored = (numbers.transpose(0, 1).flatten(1) for numbers in pairs[part])
    count = int(exact.shape[part] * 0.15 / 2)
    assert count > 0
    for largest in (True, False):
        places = exact.topk(count, dim=part, largest=largest).indices
        torch.testing.assert_close(
            stored.gather(part, places), exact.gather(part, places), rtol=1e-3, atol=1e-3
        )


def test_a_low_rank_part_of_full_rank_takes_all_of_the_error_back() -> None:
    heads = dataclasses.replace(HEADS, value_dim=16)
    form = dataclasses.replace(KIVI, bits=2, rank=16, sparsity=0.0)
    assert max(errors(form, tokens(100, heads))) <= 1e-3


def test_the_low_rank_part_is_nearly_the_best_of_its_rank() -> None:
    strand = tokens(300)
    form = dataclasses.replace(KIVI, sparsity=0.0, rank=4)
    error = strand.keys - backbone_of(form).encode(strand, None).dense().keys
    left = strand.keys - form.encode(strand, None).dense().keys
    best = torch.linalg.svdvals(error)[:, 4:].square().sum().sqrt()
    assert float(left.norm()) <= 1.05 * float(best)


@FORM
def test_bytes_are_those_of_the_tensors_and_of_nothing_else(form: GEAR) -> None:
    coded = form.encode(tokens(160), None)
    held = [coded, *vars(coded.keys).values(), *vars(coded.values).values()]
    assert not any(isinstance(part, torch.Tensor) for part in held)
    assert coded.nbytes() == sum(tensor.nbytes for tensor in coded.tensors())
    assert all(t.dtype in (torch.uint8, torch.float16, torch.int16, torch.int32) for t in coded.tensors())


def test_four_bits_take_less_than_half_of_fp16() -> None:
    heads = Heads(9, 3, 64, scale=0.125)
    coded = GEAR(bits=4, backbone="kcvt").encode(tokens(1024, heads), None)
    assert coded.nbytes() <= 0.45 * (2 * 1024 * 3 * 64 * 2)


@FORM
@EXAMPLES
@given(low=st.integers(0, 299), size=st.integers(1, 300))
def test_a_part_reads_what_the_whole_reads(form: GEAR, low: int, size: int) -> None:
    coded = form.encode(tokens(300), None)
    high = min(low + size, 300)
    whole = coded.dense()
    part = coded.split(high)[0].split(low)[1]
    assert (len(part), part.position) == (high - low, 5 + low)
    for one in (part, part.copied(), part.copied().split(1)[0]):
        assert torch.equal(one.dense().keys, whole.keys[:, low : low + len(one)])
        torch.testing.assert_close(one.dense().values, whole.values[:, low : low + len(one)])
    assert part.nbytes() == coded.nbytes()
    if high - low <= 100:
        assert part.copied().nbytes() < coded.nbytes()


@pytest.mark.parametrize(
    "chunks", [[], [3, 30], list(range(1, 60))], ids=["at once", "in parts", "one by one"]
)
def test_a_stream_is_coded_chunk_by_chunk_and_never_twice(chunks: list[int]) -> None:
    form = dataclasses.replace(KIVI, bits=2, sinks=3)
    memory = Memory(GROUPED, MemoryPlan(codec=form))
    table = TokenTable(GROUPED)
    plain = new_memory()
    ids = ids_of(60)
    table.write(plain, ids)
    kept: list[object] = []
    for low, high in zip([0, *chunks], [*chunks, 60], strict=True):
        memory.attend(*table.rows(ids[low:high]))
        memory.commit()
        assert [id(strand) for strand in memory.strands[: len(kept)]] == kept
        kept = [id(strand) for strand in memory.strands]
    exact, *coded = memory.strands
    assert torch.equal(exact.keys, plain.tail.keys[:, :3])
    assert len(exact) == 3
    for strand in coded:
        assert isinstance(strand, CodedStrand)
        run = plain.tail.split(strand.position + len(strand))[0].split(strand.position)[1]
        wanted = form.encode(run, None)
        assert all(torch.equal(a, b) for a, b in zip(strand.tensors(), wanted.tensors(), strict=True))
    assert sum(map(len, memory.strands)) % 8 == 3
    assert len(memory.tail) < 16


def test_a_prompt_is_read_exactly_and_coded_at_its_end() -> None:
    table = TokenTable(GROUPED)
    ids = ids_of(64)
    memory = Memory(GROUPED, MemoryPlan(codec=KIVI))
    for low in (0, 20, 40):
        out = memory.attend(*table.rows(ids[low : low + 20]))
        assert_equal_to(out, table.answer(ids[:low], ids[low : low + 20]))
        memory.commit(is_prompt=True)
        assert not memory.strands
    memory.attend(*table.rows(ids[60:]))
    memory.commit()
    assert [len(strand) for strand in memory.strands] == [64]


def test_forks_share_codes_and_code_their_own_tokens() -> None:
    table = TokenTable(GROUPED)
    memory = Memory(GROUPED, MemoryPlan(codec=KIVI))
    table.write(memory, ids_of(45))
    twin = memory.fork()
    shared = allocated_bytes([*memory.held(), *twin.held()])
    assert shared < memory.nbytes() + twin.nbytes()
    first = [tensor.clone() for strand in twin.strands for tensor in strand.tensors()]
    table.write(memory, ids_of(30, seed=3))
    # What the fork left plain was coded with what came after it.
    assert [type(strand) for strand in memory.strands] == [CodedStrand, CodedStrand]
    assert all(
        torch.equal(a, b) for a, b in zip(first, [t for s in twin.strands for t in s.tensors()], strict=True)
    )


def test_going_back_into_coded_tokens_keeps_the_rest() -> None:
    table = TokenTable(GROUPED)
    memory = Memory(GROUPED, MemoryPlan(codec=KIVI))
    table.write(memory, ids_of(64))
    [coded] = memory.strands
    assert isinstance(coded, CodedStrand)
    memory.truncate(29)
    [front] = memory.strands
    assert isinstance(front, CodedStrand)
    assert torch.equal(front.dense().keys, coded.dense().keys[:, :29])
    table.write(memory, ids_of(20, seed=2))
    assert [strand.position for strand in memory.strands] == [0, 29]
    assert len(memory) == 49


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_nothing_is_lost(bad: float) -> None:
    table = TokenTable(GROUPED)
    memory = Memory(GROUPED, MemoryPlan(codec=KIVI))
    q, k, v = table.rows(ids_of(20))
    v[7, 0, 1] = bad
    memory.attend(q, k, v)
    with pytest.raises(
        ConfigError, match=r"gear cannot store values that are NaN, infinite .* tokens 0 to 15"
    ):
        memory.commit()
    assert len(memory) == 20
    assert not memory.strands
    assert memory.pending == 0
    memory.truncate(7)
    table.write(memory, ids_of(20))
    assert len(memory.strands) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gear:group=32,buffer=32", "GEAR.group must divide the 16 value channels of all heads. Got 32"),
        (
            "gear:group=8,rank=9",
            "GEAR.rank and GEAR.rank_decode must be at most the head size 8. Got 9 and 2",
        ),
    ],
)
def test_layers_that_do_not_fit_are_named_when_a_memory_is_made(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_memory(GROUPED, spec)


def test_a_moved_strand_keeps_its_codes() -> None:
    coded = KIVI.encode(tokens(40), None)
    moved = coded.moved(7)
    assert (moved.position, coded.position) == (12, 5)
    assert moved.tensors()[0] is coded.tensors()[0]
    assert isinstance(moved.dense(), FrozenStrand)
    assert not isinstance(moved.dense(), DenseStrand)
