"""Every codec with every policy and every window of a model, through the same contract."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from memory_methods import CODEC_ENTRIES, MODEL_WINDOWS, POLICY_ENTRIES, CodecEntry, PolicyEntry, both
from memory_oracle import (
    GROUPED,
    Sees,
    assert_equal_to,
    ids_of,
    paths_of,
    random_tree,
    within,
)

from plait.errors import IncompatibleError
from plait.memory import POLICIES, Memory, MemoryPlan, Notes, Rows, attend
from plait.memory.arrangements import ParallelGroup
from plait.memory.policies import window as window_policy


def is_refused(codec: CodecEntry, policy: PolicyEntry) -> bool:
    """Whether the two say of each other that they cannot work together."""
    seen, stored = POLICIES.parse(policy.spec), MemoryPlan.parse(codec.spec).codec
    return (seen.stores and stored.learns_from_prompt) or (seen.cuts_strands and stored.drops_tokens)


def is_seen_whole(codec: CodecEntry, policy: PolicyEntry) -> bool:
    """Whether what a query sees depends on when tokens before it were stored; `test_snapkv` tests such a pair."""
    return policy.cuts and MemoryPlan.parse(codec.spec).codec.drops_tokens


PAIRS = [
    (codec, policy)
    for codec in CODEC_ENTRIES
    for policy in POLICY_ENTRIES
    if not is_seen_whole(codec, policy)
]
pytestmark = [
    pytest.mark.parametrize(
        ("codec", "policy"),
        [pair for pair in PAIRS if not is_refused(*pair)],
        ids=lambda entry: entry.spec,
    ),
    pytest.mark.parametrize("window", MODEL_WINDOWS, ids=lambda window: f"model-window-{window}"),
]

SLACK = 8
PAST = ids_of(48)


@pytest.fixture(autouse=True)
def _drops_come_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_policy, "_SLACK", SLACK)


class Case:
    """A new memory of one combination, and what it must answer."""

    def __init__(self, codec: CodecEntry, policy: PolicyEntry, window: int | None) -> None:
        self.table = codec.table(GROUPED)
        self.memory = Memory(GROUPED, MemoryPlan.parse(f"{policy.spec},{codec.spec}"), window)
        self.sees: Sees = both(policy.sees, within(window))
        self.distance = policy.distance
        self.tolerance = codec.tolerance(self.table)

    def answer(self, past: list[int], new: list[int], parents: Sequence[int] | None = None) -> torch.Tensor:
        return self.table.answer(past, new, parents=parents, sees=self.sees, distance=self.distance)

    def check(self, given: torch.Tensor, past: list[int], new: list[int]) -> None:
        assert_equal_to(given, self.answer(past, new), self.tolerance)


@pytest.fixture
def case(codec: CodecEntry, policy: PolicyEntry, window: int | None) -> Case:
    return Case(codec, policy, window)


@pytest.mark.parametrize(
    "cuts", [[], [1, 2, 30], list(range(1, 48))], ids=["at once", "in parts", "one by one"]
)
def test_any_chunking_equals_attention_over_what_is_seen(case: Case, cuts: list[int]) -> None:
    case.check(case.table.write(case.memory, PAST, cuts), [], PAST)


def test_twins_continue_independently(case: Case) -> None:
    case.table.write(case.memory, PAST, [20, 31])
    twin = case.memory.fork()
    for seed, one in enumerate((case.memory, twin, twin.fork()), start=1):
        new = ids_of(14, seed)
        case.check(case.table.write(one, new, [1, 5]), PAST, new)


@pytest.mark.parametrize("back", [1, SLACK])
def test_the_last_tokens_can_be_taken_back(case: Case, back: int) -> None:
    case.table.write(case.memory, PAST, range(1, 48))
    case.memory.truncate(48 - back)
    new = ids_of(5, seed=1)
    case.check(case.table.write(case.memory, new, [1]), PAST[: 48 - back], new)


def test_everything_can_be_taken_back(case: Case) -> None:
    case.table.write(case.memory, PAST, [20, 40])
    case.memory.truncate(0)
    assert len(case.memory) == 0
    case.check(case.table.write(case.memory, PAST[::-1]), [], PAST[::-1])


def test_draft_trees_equal_plain_decoding(case: Case) -> None:
    case.table.write(case.memory, PAST, [40])
    generator = torch.Generator().manual_seed(2)
    accepted = list(PAST)
    for seed in range(4):
        tree = random_tree(6, generator)
        draft = ids_of(6, seed)
        given = case.memory.attend(*case.table.rows(draft), mask=tree)
        assert_equal_to(given, case.answer(accepted, draft, tree.parents), case.tolerance)
        path = paths_of(tree)[-1]
        case.memory.commit(path)
        accepted += [draft[i] for i in path]
    case.check(case.table.write(case.memory, [1, 2]), accepted, [1, 2])


def test_packed_forks_equal_lone_ones(case: Case) -> None:
    case.table.write(case.memory, PAST, [13])
    twins = [case.memory.fork() for _ in range(3)]
    case.table.write(twins[2], [7, 8])
    pasts = [PAST, PAST, [*PAST, 7, 8]]
    news = [[1], [2, 3], [4]]
    rows = Rows([(len(new), len(past)) for new, past in zip(news, pasts, strict=True)])
    out = attend(twins, *case.table.rows([i for new in news for i in new]), rows)
    for segment, past, new in zip(rows.segments, pasts, news, strict=True):
        case.check(out[segment.rows], past, new)


def refuses_moved_tokens(memory: Memory) -> bool:
    """Whether codec or policy keep notes that cannot take over moved tokens."""
    return any(type(notes).check_splice is Notes.check_splice for notes in memory.notes)


def test_moved_tokens_answer_from_their_new_places(case: Case) -> None:
    case.table.write(case.memory, PAST, range(1, 48))
    twin = case.memory.fork()
    twin.truncate(44)
    case.table.write(twin, [1, 2])
    if refuses_moved_tokens(twin):
        with pytest.raises(IncompatibleError, match="cannot take over moved"):
            twin.splice(case.memory, 45, 48)
        return
    twin.splice(case.memory, 45, 48)
    new = ids_of(5, seed=1)
    case.check(case.table.write(twin, new, [1]), [*PAST[:44], 1, 2, *PAST[45:]], new)


def test_one_parallel_context_is_ordinary_reading(
    case: Case, policy: PolicyEntry, window: int | None
) -> None:
    case.table.write(case.memory, PAST[:42], range(1, 42))
    reader = case.memory.fork()
    case.table.write(reader, PAST[42:])
    reader.freeze()
    group = ParallelGroup([reader.pieces(42, 48)])
    if refuses_moved_tokens(case.memory):
        with pytest.raises(IncompatibleError, match="parallel contexts"):
            case.memory.append_strand(group)
        return
    new = ids_of(5, seed=1)
    if policy.cuts:
        case.sees = both(lambda query, key: key in range(42, 48) or policy.sees(query, key), within(window))
    case.memory.append_strand(group)
    case.check(case.table.write(case.memory, new, [1]), PAST, new)


def test_a_plan_is_read_back_from_its_text(case: Case) -> None:
    assert MemoryPlan.parse(str(case.memory.plan)) == case.memory.plan
