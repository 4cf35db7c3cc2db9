"""What a policy may ask of a visit, against softmax in float64 over everything that is visited at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from memory_oracle import GROUPED, LAYERS, TokenTable, assert_equal_to, biases, ids_of, random_tree, turned
from torch import Tensor

from plait.memory import Causal, FrozenStrand, Memory, MemoryPlan, Policy, Rows, Segment, attend
from plait.memory.plan import Visit
from plait.ops import Everything, Far, Mask

LENGTH, POSITION = 9, 30


@dataclass(frozen=True, kw_only=True)
class Prepared(Policy):
    """Visits that a test made."""

    make: Callable[[Memory, Segment], list[Visit]]

    def __post_init__(self) -> None:
        pass

    def visits(self, memory: Memory, segment: Segment) -> list[Visit]:
        return self.make(memory, segment)


@dataclass(frozen=True)
class Part:
    """Token ids that stand unrotated in a strand from a position on, and how they are visited."""

    ids: list[int]
    position: int
    turned_at: int | None = None
    far: int | None = None
    queries: range | None = None
    log_weight: float = 0.0
    window: int | None = None

    def visit(self, table: TokenTable, segment: Segment) -> Visit:
        keys, values = table.k[self.ids].transpose(0, 1), table.v[self.ids].transpose(0, 1)
        strand = FrozenStrand(table.heads.unplaced, keys, values, start=self.position)
        mask = None if self.far is None else Far(segment.mask, self.far, segment.length)
        return Visit(strand, self.window, mask, self.turned_at, self.queries, self.log_weight)


def answer(table: TokenTable, new: list[int], mask: Mask, parts: list[Part]) -> Tensor:
    """One softmax over all parts; queries that see nothing answer 0."""
    heads = table.heads
    group = heads.num_heads // heads.num_kv_heads
    depths = mask.depths(len(new)).tolist()
    scores, values = [], []
    for part in parts:
        places = [POSITION + d if part.turned_at is None else part.turned_at for d in depths]
        q = turned(table.q[new], places, heads)
        k = table.k[part.ids].double().repeat_interleave(group, dim=1)
        s = torch.einsum("qhd,thd->hqt", q, k) * heads.scale
        if heads.softcap is not None:
            s = heads.softcap * torch.tanh(s / heads.softcap)
        # All its keys stand where the frame begins.
        s = s + biases(heads, [[place] for place in places])
        for row, depth in enumerate(depths):
            for column in range(len(part.ids)):
                distance = POSITION + depth - part.position - column
                is_seen = distance >= (part.far or 0) and (part.window is None or distance < part.window)
                if not is_seen or (part.queries is not None and row not in part.queries):
                    s[:, row, column] = -math.inf
        scores.append(s + part.log_weight)
        values.append(table.v[part.ids].double().repeat_interleave(group, dim=1))
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("hqt,thv->qhv", weights, torch.cat(values))


def given_by(table: TokenTable, new: list[int], mask: Mask, parts: list[Part]) -> Tensor:
    """The same through a memory, whose own tail is not visited."""
    plan = MemoryPlan(policy=Prepared(make=lambda _, segment: [part.visit(table, segment) for part in parts]))
    memory = Memory(table.heads, plan)
    table.write(memory, ids_of(POSITION))
    return memory.attend(*table.rows(new), mask=mask)


def masks() -> list[Mask]:
    return [Causal(), Everything(), random_tree(LENGTH, torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("mask", masks(), ids=["causal", "everything", "tree"])
@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"turned_at": 0},
        {"turned_at": 11},
        {"queries": range(2, 7)},
        {"queries": range(3, 3)},
        {"log_weight": -1.5},
        {"log_weight": 40.0},
        {"far": 25},
        {"far": 100},
        {"window": 26, "far": 22},
        {"turned_at": 5, "far": 24, "queries": range(4, 9), "log_weight": 2.0, "window": 33},
    ],
    ids=str,
)
def test_a_visit_equals_one_softmax(mask: Mask, layer: str, change: dict[str, object]) -> None:
    table, new = TokenTable(LAYERS[layer]), ids_of(LENGTH, seed=3)
    base = {"turned_at": 3}
    parts = [
        Part(ids_of(8, 5), 2, turned_at=7),
        Part(ids_of(9, 6), 3, **{**base, **change}),  # type: ignore[arg-type]
        Part(ids_of(4, 7), 20, turned_at=1),
    ]
    assert_equal_to(given_by(table, new, mask, parts), answer(table, new, mask, parts))


def test_queries_that_visit_nothing_answer_zero() -> None:
    table, new = TokenTable(GROUPED), ids_of(LENGTH)
    out = given_by(table, new, Causal(), [Part(ids_of(5), 0, turned_at=2, queries=range(2, 4))])
    assert out[2:4].abs().min() > 0
    assert bool((out[:2] == 0).all())
    assert bool((out[4:] == 0).all())


@pytest.mark.parametrize("depth", range(1, 5))
def test_runs_of_queries_see_of_their_own_rows_what_all_of_them_see(depth: int) -> None:
    """The tail visited in two runs of queries, as a plain memory would answer."""
    table, past, new = TokenTable(GROUPED), ids_of(POSITION), ids_of(LENGTH, seed=1)
    for mask in (Causal(), Everything(), random_tree(LENGTH, torch.Generator().manual_seed(depth))):
        cut = 2 * depth

        def halves(memory: Memory, segment: Segment, cut: int = cut) -> list[Visit]:
            runs = (range(cut), range(cut, segment.length))
            return [Visit(strand, queries=run) for strand in memory.all_strands() for run in runs]

        memory = Memory(GROUPED, MemoryPlan(policy=Prepared(make=halves)))
        plain = Memory(GROUPED, MemoryPlan.parse("full"))
        for one in (memory, plain):
            table.write(one, past)
        given_ = memory.attend(*table.rows(new), mask=mask)
        assert_equal_to(given_, plain.attend(*table.rows(new), mask=mask).double())


def test_sequences_that_share_a_pinned_strand_equal_lone_ones() -> None:
    """One strand visited by three sequences: pinned alike, pinned elsewhere, and with a weight."""
    table, new = TokenTable(GROUPED), ids_of(2, seed=2)
    keys, values = table.k[:12].transpose(0, 1), table.v[:12].transpose(0, 1)
    strand = FrozenStrand(GROUPED, keys, values)
    ways = [(9, 0.0, None), (9, 0.7, None), (4, 0.0, None), (9, 0.0, range(1, 2))]

    def memory_of(turned_at: int, log_weight: float, queries: range | None) -> Memory:
        def make(memory: Memory, segment: Segment) -> list[Visit]:
            pinned = Visit(strand, turned_at=turned_at, log_weight=log_weight, queries=queries)
            return [pinned, *(Visit(own) for own in memory.all_strands())]

        memory = Memory(GROUPED, MemoryPlan(policy=Prepared(make=make)))
        table.write(memory, ids_of(POSITION))
        return memory

    rows = Rows([(2, POSITION)] * len(ways))
    packed = attend([memory_of(*way) for way in ways], *table.rows(new * len(ways)), rows)
    for segment, way in zip(rows.segments, ways, strict=True):
        lone = memory_of(*way).attend(*table.rows(new))
        assert_equal_to(packed[segment.rows], lone.double())


def test_a_pinned_visit_needs_no_positions() -> None:
    table = TokenTable(LAYERS["no-positions"])
    new = ids_of(3)
    parts = [Part(ids_of(6, 1), 0, turned_at=5), Part(ids_of(6, 2), 7)]
    assert_equal_to(given_by(table, new, Causal(), parts), answer(table, new, Causal(), parts))
