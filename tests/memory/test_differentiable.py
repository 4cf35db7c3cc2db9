"""Gradients through a memory are those of attention over what its policy shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from memory_methods import CODEC_ENTRIES, MODEL_WINDOWS, POLICY_ENTRIES, PolicyEntry, both
from memory_oracle import GROUPED, TokenTable, assert_equal_to, ids_of, random_tree, within

from plait.errors import IncompatibleError
from plait.memory import POLICIES, Memory, MemoryPlan, Rows, attend
from plait.memory.policies import PrFlash

IDS = ids_of(37)
# Two chains of fp32 sums, forward and back, of numbers up to some tens.
TOLERANCE = 2e-4


def differentiable(spec: str) -> MemoryPlan:
    return replace(MemoryPlan.parse(spec), differentiable=True)


def learned(table: TokenTable) -> list[torch.Tensor]:
    """The table's numbers, which are to take gradients from now on."""
    return [numbers.requires_grad_() for numbers in (table.q, table.k, table.v)]


@pytest.mark.parametrize("window", MODEL_WINDOWS, ids=lambda window: f"model-window-{window}")
@pytest.mark.parametrize(
    "entry",
    [entry for entry in POLICY_ENTRIES if not POLICIES.parse(entry.spec).stores],
    ids=lambda entry: entry.spec,
)
def test_gradients_are_those_of_what_is_seen(entry: PolicyEntry, window: int | None) -> None:
    table = TokenTable(GROUPED)
    direction = torch.randn(
        len(IDS), GROUPED.num_heads, GROUPED.head_dim, generator=torch.Generator().manual_seed(1)
    )
    memory = Memory(GROUPED, differentiable(entry.spec), window)
    plain = Memory(GROUPED, MemoryPlan.parse(entry.spec), window).attend(*table.rows(IDS))
    numbers = learned(table)
    out = memory.attend(*table.rows(IDS))
    assert_equal_to(out, plain)
    given = torch.autograd.grad((out * direction).sum(), numbers)
    sees = both(entry.sees, within(window))
    oracle = table.answer([], IDS, sees=sees, distance=entry.distance)
    wanted = torch.autograd.grad((oracle * direction.double()).sum(), numbers)
    for name, one, other in zip("qkv", given, wanted, strict=True):
        assert name != "v" or other.abs().max() > 0.1
        torch.testing.assert_close(
            one, other, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_several_sequences_of_a_batch_have_their_own_gradients() -> None:
    lengths, table = [9, 0, 20], TokenTable(GROUPED)
    plan = differentiable("prflash:block=4,correct=true,mode=bernoulli")
    q, k, v = learned(table)
    whole = attend(
        [Memory(GROUPED, plan) for _ in lengths], *table.rows(IDS[:29]), Rows([(n, 0) for n in lengths])
    )
    together = torch.autograd.grad(whole.square().sum(), (q, k, v))
    apart = [Memory(GROUPED, plan).attend(*table.rows(ids)) for ids in (IDS[:9], IDS[9:29])]
    alone = torch.autograd.grad(sum(out.square().sum() for out in apart), (q, k, v))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_second_pass_and_a_path_of_a_tree_keep_the_graph_of_the_first() -> None:
    table = TokenTable(GROUPED)
    memory = Memory(GROUPED, differentiable("full"))
    numbers = learned(table)
    tree = random_tree(5, torch.Generator().manual_seed(2))
    first = memory.attend(*table.rows(IDS[:8]))
    memory.commit()
    second = memory.attend(*table.rows(IDS[8:13]), mask=tree)
    path = [0]
    while (
        child := next((n for n, parent in enumerate(tree.parents) if parent == path[-1]), None)
    ) is not None:
        path.append(child)
    memory.commit(path)
    kept = IDS[:8] + [IDS[8 + node] for node in path]
    third = memory.attend(*table.rows(IDS[20:24]))
    given = torch.autograd.grad((first.sum() + second.sum() + third.square().sum()), numbers)
    oracle = (
        table.answer([], IDS[:8]).sum()
        + table.answer(IDS[:8], IDS[8:13], parents=tree.parents).sum()
        + table.answer(kept, IDS[20:24]).square().sum()
    )
    for one, other in zip(given, torch.autograd.grad(oracle, numbers), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    "spec",
    [entry.spec for entry in CODEC_ENTRIES if not MemoryPlan.parse(entry.spec).codec.seals_nothing]
    + ["infllm"],
)
def test_tokens_in_another_form_have_no_gradient_and_are_refused(spec: str) -> None:
    with pytest.raises(IncompatibleError, match=r"No gradient flows through .*Train through a policy"):
        differentiable(spec)


def test_every_step_of_training_has_draws_of_its_own_and_use_has_others() -> None:
    policy = PrFlash(block=4, seed=3)
    rows = range(40)
    draws = [tuple(one.kept(0, row) for row in rows) for one in (policy, *map(policy.redrawn, range(6)))]
    assert len(set(draws)) == 7
    assert [sum(map(len, one)) for one in draws] == [sum(map(len, draws[0]))] * 7, "the same budget"
    assert policy.redrawn(2) == policy.redrawn(2)
    full = MemoryPlan.parse("full").policy
    assert full.redrawn(1) is full
