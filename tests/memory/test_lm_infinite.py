"""LM-Infinite sees the first and the last tokens at limited distances, in constant memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_methods import at_most, both, first_and_last, in_the_cache
from memory_oracle import (
    GROUPED,
    LAYERS,
    TokenTable,
    assert_equal_to,
    frequencies,
    ids_of,
    new_memory,
    random_tree,
    refusal,
    within,
)

from plait.errors import ConfigError, IncompatibleError
from plait.memory import Heads, Memory, MemoryPlan
from plait.memory.policies import LMInfinite
from plait.memory.policies import window as window_policy
from plait.ops import Rope

TABLE = TokenTable(GROUPED)
TOKEN_BYTES = 2 * GROUPED.num_kv_heads * GROUPED.head_dim * 4
EXAMPLES = settings(deadline=None, max_examples=40, derandomize=True)


@EXAMPLES
@given(
    layer=st.sampled_from(sorted(LAYERS)),
    local=st.integers(1, 40),
    initial=st.integers(0, 12),
    window=st.none() | st.integers(1, 60),
    length=st.integers(1, 90),
    cuts=st.lists(st.integers(0, 90), max_size=12),
    is_streaming=st.booleans(),
    forks=st.booleans(),
)
def test_any_chunking_equals_a_dense_mask_with_clamped_distances(
    layer: str,
    local: int,
    initial: int,
    window: int | None,
    length: int,
    cuts: list[int],
    is_streaming: bool,
    forks: bool,
) -> None:
    initial = min(initial, local - 1)
    table, ids = TokenTable(LAYERS[layer]), ids_of(length)
    style = "streaming" if is_streaming else "lambda"
    spec = f"lm-infinite:local={local},initial={initial},style={style}"
    memory = new_memory(LAYERS[layer], spec, window)
    bounds = [0, *sorted(min(cut, length) for cut in cuts), length]
    outs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_policy, "_SLACK", 5)
        for low, high in zip(bounds, bounds[1:], strict=False):  # noqa: RUF007
            if forks:
                memory = memory.fork()
            outs.append(table.write(memory, ids[low:high]))
    sees = both(first_and_last(local, initial), within(window))
    distance = in_the_cache(local, initial) if is_streaming else at_most(local)
    assert_equal_to(torch.cat(outs), table.answer([], ids, sees=sees, distance=distance))


@pytest.mark.parametrize("initial", [0, 1, 10, 64])
@pytest.mark.parametrize("local", [16, 65, 256])
def test_chunks_of_any_size_agree(local: int, initial: int) -> None:
    if initial >= local:
        with pytest.raises(ConfigError, match=r"LMInfinite.initial must be below local 16. Got 64"):
            LMInfinite(local=local, initial=initial)
        return
    ids = ids_of(400)
    wanted = TABLE.answer([], ids, sees=first_and_last(local, initial), distance=at_most(local))
    for chunk in (1, 7, 64, 400):
        memory = new_memory(spec=f"lm-infinite:local={local},initial={initial}")
        assert_equal_to(TABLE.write(memory, ids, range(chunk, 400, chunk)), wanted)


@pytest.mark.parametrize("style", ["lambda", "streaming"])
@pytest.mark.parametrize("window", [None, 2, 7])
def test_drafts_deeper_than_the_limit_at_the_very_beginning(style: str, window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    for local in (2, 3, 4):
        for past in range(5):
            initial = local - 1
            tree = random_tree(9, generator)
            memory = new_memory(
                spec=f"lm-infinite:local={local},initial={initial},style={style}", window=window
            )
            ids, draft = ids_of(past), ids_of(9, seed=1)
            if past:
                TABLE.write(memory, ids)
            wanted = TABLE.answer(
                ids,
                draft,
                parents=tree.parents,
                sees=both(first_and_last(local, initial), within(window)),
                distance=at_most(local) if style == "lambda" else in_the_cache(local, initial),
            )
            assert_equal_to(memory.attend(*TABLE.rows(draft), mask=tree), wanted)


def test_a_sequence_within_the_limit_is_seen_as_by_full_attention() -> None:
    ids = ids_of(300)
    for spec in ("lm-infinite:local=300,initial=10", "lm-infinite:local=290,initial=10,style=streaming"):
        given_ = TABLE.write(new_memory(spec=spec), ids, [100, 101])
        assert_equal_to(given_, TABLE.answer([], ids))


def test_a_scaled_rope_keeps_its_amplitude() -> None:
    """YaRN multiplies cosine and sine; a key that is turned back must keep the factor once."""
    heads = Heads(2, 1, 8, scale=0.3, rope=Rope(frequencies(8), amplitude=1.3))
    plain = Heads(2, 1, 8, scale=0.3 * 1.3**2, rope=Rope(frequencies(8)))
    ids = ids_of(60)
    outs = [
        TokenTable(one).write(new_memory(one, "lm-infinite:local=9,initial=4"), ids, [20, 41, 42])
        for one in (heads, plain)
    ]
    assert_equal_to(outs[0], outs[1].double())


@pytest.mark.parametrize("style", ["lambda", "streaming"])
def test_going_back_is_exact_or_refused(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_policy, "_SLACK", 5)
    local, initial, length = 6, 3, 40
    distance = at_most(local) if style == "lambda" else in_the_cache(local, initial)
    ids, new = ids_of(length), ids_of(12, seed=1)
    for back_to in range(length + 1):
        memory = new_memory(spec=f"lm-infinite:local={local},initial={initial},style={style}")
        TABLE.write(memory, ids, range(1, length))
        message = refusal(memory, back_to)
        assert message is None or f"Cannot go back to {back_to} tokens: lm-infinite:local=6" in message
        assert message is None or 0 < back_to < length - 5
        kept = ids[:back_to] if message is None else ids
        wanted = TABLE.answer(kept, new, sees=first_and_last(local, initial), distance=distance)
        assert_equal_to(TABLE.write(memory, new, [1]), wanted)


def stream(memory: Memory, length: int, step: int) -> int:
    """Write tokens without asking for answers; the most bytes that were allocated between calls."""
    _, k, v = TABLE.rows(ids_of(step))
    most = 0
    for _ in range(length // step):
        memory.append(k, v)
        memory.commit()
        most = max(most, memory.nbytes())
    return most


@pytest.mark.parametrize("style", ["lambda", "streaming"])
def test_bytes_stay_flat_over_a_hundred_thousand_tokens(style: str) -> None:
    memory = new_memory(spec=f"lm-infinite:local=500,initial=10,style={style}")
    bound = 1.25 * (500 + 10 + 2 * 256) * TOKEN_BYTES
    assert stream(memory, 100_000, 50) <= bound
    assert len(memory.strands) <= 2
    last = ids_of(40, seed=4)
    given_ = TABLE.write(memory, last, range(1, 40))
    assert given_.isfinite().all()


def test_answers_do_not_depend_on_how_far_the_stream_is() -> None:
    """Distances are integers until they become angles, so a stream may go on for hundreds of millions."""
    memory = new_memory(spec="lm-infinite:local=20,initial=4")
    ids = ids_of(80)
    TABLE.write(memory, ids)
    early = TABLE.write(memory, ids, [40])
    far = new_memory(spec="lm-infinite:local=20,initial=4")
    TABLE.write(far, ids)
    # The ring begins anew at a huge position, with the same tokens in front of it.
    far.strands, far.tail = [], far._new_tail(300_000_000)
    TABLE.write(far, ids[-40:])
    late = TABLE.write(far, ids, [40])
    assert_equal_to(late, early.double(), 1e-4)


def test_a_model_whose_speeds_depend_on_the_length_is_refused() -> None:
    rope = Rope(frequencies(8), rule=lambda length: (frequencies(8), 1.0))
    heads = Heads(2, 1, 8, scale=1.0, rope=rope)
    with pytest.raises(IncompatibleError, match=r"lm-infinite:local=64 limits distances, but this model"):
        Memory(heads, MemoryPlan.parse("lm-infinite:local=64"))


def test_the_largest_distance_is_known() -> None:
    assert LMInfinite(local=64, initial=4).max_distance == 64
    assert LMInfinite(local=64, initial=4, style="streaming").max_distance == 67
    assert MemoryPlan.parse("window:size=64").policy.max_distance is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lm-infinite:local=0", r"LMInfinite.local must be a whole number in \[1, inf\). Got"),
        ("lm-infinite:initial=-1", r"LMInfinite.initial must be a whole number in \[0, inf\). Got"),
        ("lm-infinite:style=ring", r"LMInfinite.style must be lambda or streaming. Got 'ring'"),
        ("lm-infinite:local=8,initial=8", r"LMInfinite.initial must be below local 8. Got 8"),
    ],
)
def test_bad_settings_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryPlan.parse(spec)
