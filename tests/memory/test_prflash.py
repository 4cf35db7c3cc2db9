"""PrFlash sees the blocks that it drew, reads no others, and draws the same ones every time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracle import GROUPED, LAYERS, TokenTable, assert_equal_to, biases, ids_of, new_memory, turned

from plait.errors import ConfigError
from plait.memory import FrozenStrand, MemoryPlan, Past
from plait.memory.policies import PrFlash
from plait.memory.policies.prflash import _uniform

TABLE = TokenTable(GROUPED)
EXAMPLES = settings(deadline=None, max_examples=30, derandomize=True)
WORD = 2**64


@EXAMPLES
@given(
    layer=st.sampled_from(sorted(LAYERS)),
    block=st.integers(1, 9),
    p=st.sampled_from(["harmonic", "power", "geometric", "floor"]),
    rate=st.floats(0.05, 1.0),
    near=st.integers(1, 3),
    sink_blocks=st.integers(0, 2),
    mode=st.sampled_from(["budget", "bernoulli"]),
    correct=st.booleans(),
    seed=st.integers(0, 5),
    cuts=st.lists(st.integers(1, 59), max_size=6),
)
def test_equals_dense_attention_over_the_reported_blocks(
    layer: str,
    block: int,
    p: str,
    rate: float,
    near: int,
    sink_blocks: int,
    mode: str,
    correct: bool,
    seed: int,
    cuts: list[int],
) -> None:
    table, ids, heads = TokenTable(LAYERS[layer]), ids_of(60), LAYERS[layer]
    policy = PrFlash(
        block=block, p=p, rate=rate, near=near, sink_blocks=sink_blocks, mode=mode, seed=seed,  # type: ignore[arg-type]
        correct=correct and mode == "bernoulli",
    )  # fmt: skip
    memory = new_memory(heads, str(policy))
    assert memory.plan.policy == policy
    given_ = table.write(memory, ids, sorted(cuts))
    weights = torch.full((60, 60), -math.inf, dtype=torch.float64)
    for i in range(60):
        law = policy.probabilities(i // block)
        for j in range(i + 1):
            if j // block in policy.kept(0, i // block):
                weights[i, j] = -math.log(law[j // block]) if policy.correct else 0.0
    group = heads.num_heads // heads.num_kv_heads
    q = turned(table.q[ids], range(60), heads)
    k = turned(table.k[ids], range(60), heads).repeat_interleave(group, dim=1)
    v = table.v[ids].double().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,thd->hqt", q, k) * heads.scale
    if heads.softcap is not None:
        scores = heads.softcap * torch.tanh(scores / heads.softcap)
    scores = scores + biases(heads, [[i - j for j in range(60)] for i in range(60)])
    assert_equal_to(given_, torch.einsum("hqt,thv->qhv", (scores + weights).softmax(dim=-1), v))


def test_probability_one_is_full_attention() -> None:
    ids = ids_of(100)
    for spec in ("prflash:block=8,p=floor,rate=1.0", "prflash:block=8,p=geometric,rate=1.0,mode=bernoulli"):
        assert_equal_to(TABLE.write(new_memory(spec=spec), ids, [33, 34]), TABLE.answer([], ids))


@pytest.mark.parametrize("spec", ["prflash", "prflash:p=power", "prflash:p=geometric,rate=0.8,sink_blocks=3"])
def test_a_budget_keeps_as_many_blocks_as_are_expected(spec: str) -> None:
    policy = MemoryPlan.parse(spec).policy
    assert isinstance(policy, PrFlash)
    counts = [len(policy.kept(0, row)) for row in range(300)]
    for row, count in enumerate(counts):
        assert count == min(row + 1, math.ceil(round(float(policy.probabilities(row).sum()), 9)))
        assert policy.kept(0, row)[-1] == row
        assert set(range(min(policy.sink_blocks, row + 1))) <= set(policy.kept(0, row))
    assert counts == sorted(counts)


def test_independent_draws_keep_the_expected_fraction() -> None:
    policy = PrFlash(p="power", mode="bernoulli", sink_blocks=0)
    total = sum(len(policy.kept(layer, row)) for layer in range(20) for row in range(200))
    laws = [policy.probabilities(row) for row in range(200)]
    expected = 20 * sum(float(law.sum()) for law in laws)
    spread = math.sqrt(20 * sum(float((law * (1 - law)).sum()) for law in laws))
    assert spread > 50
    assert abs(total - expected) <= 3 * spread


def test_layers_rows_and_seeds_draw_apart_and_always_alike() -> None:
    policy = PrFlash(mode="bernoulli", p="floor", rate=0.5)
    draws = {(seed, layer, row): tuple(_uniform(seed, layer, row)[:8].tolist())
             for seed in range(3) for layer in range(3) for row in range(8, 11)}  # fmt: skip
    assert len(set(draws.values())) == 27
    assert policy.kept(3, 50) == PrFlash(mode="bernoulli", p="floor", rate=0.5).kept(3, 50)


def test_draws_are_those_of_splitmix() -> None:
    """In Python's own integers, so that no rounding or sign of a machine matters."""

    def mixed(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
        word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
        return word ^ word >> 31

    key = 0
    for part in (7, 2, 40):
        key = mixed((key + part + 1) * 0x9E3779B97F4A7C15 % WORD)
    words = [mixed((key + (j + 1) * 0x9E3779B97F4A7C15) % WORD) for j in range(41)]
    assert _uniform(7, 2, 40).tolist() == [((word >> 11) + 0.5) * 2.0**-53 for word in words]


def test_blocks_that_were_not_drawn_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PrFlash(block=16)
    memory = new_memory(spec="prflash:block=16")
    TABLE.write(memory, ids_of(16 * 40))
    read, plain = [], FrozenStrand.attend

    def counted(strand: FrozenStrand, *args: object, **kwargs: object) -> object:
        read.append(len(strand))
        return plain(strand, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(FrozenStrand, "attend", counted)
    memory.attend(*TABLE.rows(ids_of(16)))
    assert sum(read) == 16 * len(policy.kept(0, 40))
    assert len(policy.kept(0, 40)) <= 7


def test_each_layer_of_a_past_draws_its_own_blocks() -> None:
    past = Past([new_memory(spec="prflash:block=2,sink_blocks=0") for _ in range(3)])
    outs = [TABLE.write(layer, ids_of(60)) for layer in past.layers]  # type: ignore[arg-type]
    assert not torch.allclose(outs[0], outs[1])
    twin = past.fork()
    assert [layer.layer for layer in twin.layers] == [0, 1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prflash:block=0", r"PrFlash.block must be a whole number in \[1, inf\). Got"),
        ("prflash:p=linear", "PrFlash.p must be harmonic, power, geometric or floor. Got 'linear'"),
        ("prflash:rate=0", r"PrFlash.rate must be a number in \(0, inf\). Got"),
        ("prflash:p=floor,rate=1.5", r"PrFlash.rate must be in \(0, 1\] with p=floor. Got 1.5"),
        ("prflash:near=0", r"PrFlash.near must be a whole number in \[1, inf\). Got"),
        ("prflash:correct=true", "PrFlash.correct needs mode=bernoulli"),
    ],
)
def test_bad_settings_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryPlan.parse(spec)
