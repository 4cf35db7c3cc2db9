"""A memory answers as attention over everything it was given, however it was given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import (
    GROUPED,
    LAYERS,
    TokenTable,
    assert_equal_to,
    ids_of,
    new_memory,
    storage_bound,
    within,
)

from plait.errors import CapacityError, ConfigError
from plait.memory import DenseStrand, Everything, Heads, Memory, Rows, attend
from plait.ops import partial_attention, rotate

EXAMPLES = settings(deadline=None, max_examples=25, derandomize=True)


@EXAMPLES
@given(
    layer=st.sampled_from(sorted(LAYERS)),
    length=st.integers(1, 80),
    cuts=st.lists(st.integers(0, 80), max_size=8),
    window=st.none() | st.integers(1, 90),
)
def test_any_chunking_equals_one_full_attention(
    layer: str, length: int, cuts: list[int], window: int | None
) -> None:
    table, ids = TokenTable(LAYERS[layer]), ids_of(length)
    memory = new_memory(LAYERS[layer], window=window)
    given_ = table.write(memory, ids, sorted(min(cut, length) for cut in cuts))
    assert_equal_to(given_, table.answer([], ids, sees=within(window)))
    assert len(memory) == length


def test_token_by_token_equals_one_full_attention() -> None:
    table, ids, memory = TokenTable(GROUPED), ids_of(90), new_memory()
    assert_equal_to(table.write(memory, ids, range(1, 90)), table.answer([], ids))


def test_rows_that_are_not_committed_are_part_of_the_past_of_the_next() -> None:
    table, ids, memory = TokenTable(GROUPED), ids_of(30), new_memory()
    outs = [memory.attend(*table.rows(ids[low:high])) for low, high in ((0, 11), (11, 12), (12, 30))]
    assert memory.pending == 30
    assert_equal_to(torch.cat(outs), table.answer([], ids))


def test_no_row_gives_no_answer_and_changes_nothing() -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    assert memory.attend(*table.rows([])).shape == (0, 4, 8)
    table.write(memory, [1, 2, 3])
    assert memory.attend(*table.rows([])).shape == (0, 4, 8)
    assert len(memory) == 3
    rows = Rows([])
    assert attend([], *table.rows([]), rows).shape == (0, 4, 8)


def test_a_bidirectional_chunk_sees_itself_in_both_directions() -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    table.write(memory, ids_of(5))
    given_ = memory.attend(*table.rows(ids_of(4, seed=1)), mask=Everything())
    # The last row sees what a causal query sees; the first one sees all nine keys as well.
    causal = new_memory()
    table.write(causal, ids_of(5))
    last_row = causal.attend(*table.rows(ids_of(4, seed=1)))[3]
    torch.testing.assert_close(given_[3], last_row)
    q, k, v = table.rows([*ids_of(5), *ids_of(4, seed=1)])
    rope = GROUPED.rope
    assert rope is not None
    angles = rope.angles(torch.arange(9))
    whole = partial_attention(
        rotate(q, angles)[5:],
        rotate(k, angles).transpose(0, 1),
        v.transpose(0, 1),
        scale=GROUPED.scale,
    )
    assert_equal_to(given_, whole.out)


@pytest.mark.parametrize(("dtype", "unit"), [("bf16", 2**-8), ("fp16", 2**-11)])
@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_half_precision_stays_within_its_stated_bound(dtype: str, unit: float, layer: str) -> None:
    table, ids = TokenTable(LAYERS[layer]), ids_of(120)
    memory = new_memory(LAYERS[layer], f"dense:dtype={dtype}")
    error = (table.write(memory, ids, [50, 51, 90]).double() - table.answer([], ids)).abs().max().item()
    assert 1e-5 < error < storage_bound(table, unit)
    assert memory.tail.keys.element_size() == 2


def test_a_longer_past_takes_bytes_in_proportion() -> None:
    table = TokenTable(GROUPED)
    memory = new_memory()
    assert memory.nbytes() == 0
    table.write(memory, ids_of(1000))
    held = 2 * 1000 * GROUPED.num_kv_heads * GROUPED.head_dim * 4
    assert held <= memory.nbytes() <= 1.25 * held
    half = new_memory(spec="dense:dtype=bf16")
    table.write(half, ids_of(1000))
    assert 2 * half.nbytes() == memory.nbytes()


def test_what_nobody_wrote_is_never_read() -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    table.write(memory, ids_of(70), [60])
    room = memory.tail._keys[:, len(memory.tail) :]
    assert room.shape[1] == 5
    assert room.isnan().all(), "the suite fills uninitialised memory with NaN"
    assert memory.attend(*table.rows(ids_of(3))).isfinite().all()


def test_what_is_remembered_carries_no_gradient() -> None:
    table, memory = TokenTable(GROUPED), new_memory()
    q, k, v = (tensor.requires_grad_() for tensor in table.rows(ids_of(6)))
    out = memory.attend(q, k, v)
    assert out.requires_grad
    assert not memory.tail.keys.requires_grad
    assert not memory.tail.values.requires_grad


def test_a_memory_can_be_used_inside_and_outside_inference_mode() -> None:
    table, ids = TokenTable(GROUPED), ids_of(200)
    with torch.inference_mode():
        memory = new_memory()
        first = table.write(memory, ids[:5])
    # These still fit into the storage that was made in inference mode.
    assert memory.tail._keys.shape[1] == 32
    second = table.write(memory, ids[5:140], [1, 9, 27])
    with torch.inference_mode():
        third = table.write(memory, ids[140:190])
        twin = memory.fork()
    fourth = table.write(twin, ids[190:])
    assert_equal_to(torch.cat([first, second, third, fourth]), table.answer([], ids))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (0, r"attend takes q of shape \(3, 4, 8\): rows, heads, head size. Got \(3, 4, 6\)"),
        (1, r"attend takes k of shape \(3, 2, 8\): rows, heads, head size. Got \(3, 2, 6\)"),
        (2, r"attend takes v of shape \(3, 2, 8\): rows, heads, head size. Got \(3, 2, 6\)"),
    ],
)
def test_shapes_of_another_layer_are_refused_before_anything_is_written(wrong: int, message: str) -> None:
    tensors = list(TokenTable(GROUPED).rows([1, 2, 3]))
    tensors[wrong] = tensors[wrong][..., :6]
    memory = new_memory()
    with pytest.raises(ConfigError, match=message):
        memory.attend(*tensors)
    assert len(memory) == 0


def test_more_keys_than_queries_are_refused() -> None:
    q, k, v = TokenTable(GROUPED).rows([1, 2, 3])
    with pytest.raises(ConfigError, match=r"attend takes k of shape \(2, 2, 8\)"):
        new_memory().attend(q[:2], k, v)


def test_heads_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Heads.num_kv_heads must divide num_heads 6. Got 4"):
        Heads(6, 4, 8, scale=1.0)
    with pytest.raises(ConfigError, match=r"Heads.softcap must be above 0, or None. Got 0.0"):
        Heads(6, 3, 8, scale=1.0, softcap=0.0)


def test_running_out_of_memory_leaves_the_strand_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    table, ids, memory = TokenTable(GROUPED), ids_of(70), new_memory()
    table.write(memory, ids[:30])
    plain, calls = DenseStrand._grown, []

    def fails_on_values(strand: DenseStrand, old: torch.Tensor, capacity: int) -> torch.Tensor:
        calls.append(capacity)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(strand, old, capacity)

    with monkeypatch.context() as patch:
        patch.setattr(DenseStrand, "_grown", fails_on_values)
        with pytest.raises(CapacityError, match="No memory for keys and values of 60 tokens"):
            memory.attend(*table.rows(ids[30:60]))
    assert len(memory) == 30
    # These fit into what was asked for: keys and values must have grown together, or not at all.
    assert_equal_to(table.write(memory, ids[30:55]), table.answer(ids[:30], ids[30:55]))


def test_reading_the_same_past_twice_gives_the_same_bits() -> None:
    table, ids = TokenTable(GROUPED), ids_of(50)

    def once(memory: Memory) -> torch.Tensor:
        return table.write(memory, ids, [20, 21])

    assert torch.equal(once(new_memory()), once(new_memory()))
