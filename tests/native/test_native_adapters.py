"""Adapters in a native program: close to the modules, and a row's bits do not depend on whose rows are beside it."""

from __future__ import annotations

import pytest
import torch
from native_support import extension, isas, running, switched_off
from test_lowered import TOLERANCE, distance, model
from torch import Tensor

from plait.memory import MemoryPlan, Rows
from plait.nn import Transformer, lower
from plait.nn.adapters import Adapter, new_adapter
from plait.weights.adapters import ADAPTERS

pytestmark = switched_off

SPECS = [
    "lora:rank=5",
    "dora:rank=3",
    "vera:rank=40",
    "adalora:first_rank=6,rank=4",
    "ia3",
    "bitfit",
    "lora:rank=1,targets=gate+down",
    "ia3:targets=output+up+query",
    "lora:rank=64,targets=query",
    "prefix:tokens=7,spread=1.0",
    "prompt:tokens=3,spread=1.0",
    "serial:size=6",
    "serial:size=3,targets=down,activation=silu",
    "parallel:size=5",
    "parallel:size=4,targets=output+down,scale=1.0,activation=gelu",
]


def adapters_of(base: Transformer, specs: list[str]) -> list[Adapter]:
    found = []
    for seed, spec in enumerate(specs):
        adapter = new_adapter(ADAPTERS.parse(spec), base, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        found.append(adapter.eval())
    return found


@torch.no_grad()
def answers(base: Transformer, adapters: list[Adapter | None], lengths: list[int]) -> list[Tensor]:
    """Logits of every row of sequences that begin with the same tokens."""
    ids = torch.randint(0, 101, (max(lengths),), generator=torch.Generator().manual_seed(0))
    pasts = [base.new_past(MemoryPlan(), adapter) for adapter in adapters]
    tokens = torch.cat([ids[:length] for length in lengths])
    rows = Rows([(length, 0) for length in lengths])
    logits = base.answer(tokens, rows, pasts, wanted=torch.arange(len(rows)))
    return list(logits.split(lengths))


@pytest.mark.parametrize("kind", ["plain", "rich", "ungated"])
def test_a_program_computes_what_the_modules_compute(kind: str) -> None:
    base = model(kind)
    # Where embeddings are scaled, as in "rich", nothing can be put before a text.
    left_out = {"plain": (), "rich": ("prefix", "prompt"), "ungated": ("gate",)}[kind]
    specs = [spec for spec in SPECS if not any(word in spec for word in left_out)]
    adapters = [None, *adapters_of(base, specs)]
    lengths = [1, *([9] * len(specs))]
    lengths[2] = 1
    wanted = answers(base, adapters, lengths)
    assert lower(base)
    assert all(adapter.to_native() is not None for adapter in adapters if adapter is not None)
    found = answers(base, adapters, lengths)
    for name, ours, theirs in zip(["none", *specs], found, wanted, strict=True):
        assert distance(ours, theirs) < TOLERANCE, name
    unchanged = answers(base, [None] * len(adapters), lengths)
    assert torch.equal(found[0], unchanged[0])
    assert all(distance(a, b) > 0.03 for a, b in zip(found[1:], unchanged[1:], strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_each_answers_alone_as_in_any_batch(threads: int) -> None:
    base = model()
    assert lower(base)
    adapters = [None, *adapters_of(base, SPECS)]
    lengths = [3 + 5 * (number % 3) for number in range(len(adapters))]
    with running(threads=threads):
        together = answers(base, adapters, lengths)
        backwards = answers(base, adapters[::-1], lengths[::-1])[::-1]
        for adapter, length, mine, theirs in zip(adapters, lengths, together, backwards, strict=True):
            assert torch.equal(mine, answers(base, [adapter], [length])[0])
            assert torch.equal(mine, theirs)
            # A prompt read token by token has the bits of one read at once.
            assert torch.equal(mine[:1], answers(base, [adapter], [1])[0])


def test_every_instruction_set_gives_the_same_bits() -> None:
    base = model("rich")
    assert lower(base)
    adapters: list[Adapter | None] = list(adapters_of(base, [*SPECS[:4], *SPECS[-4:]]))
    found = []
    for isa in isas():
        with running(isa=isa):
            found.append(torch.cat(answers(base, adapters, [4, 1, 2, 9, 3, 1, 7, 5])))
    assert all(torch.equal(one, found[0]) for one in found)


def test_what_a_program_has_not_is_computed_by_the_modules() -> None:
    base = model()
    (adapter,) = adapters_of(base, ["ia3:targets=down"])
    change = adapter.at["blocks.0.feed_forward.down"]
    # Scaled inputs of query, key and value differ in one product of the program.
    adapter.at["blocks.0.mixer.query"] = type(change)(torch.rand(64) + 0.5, of_inputs=True)  # type: ignore[call-arg]
    wanted = answers(base, [adapter, None], [5, 2])
    assert lower(base)
    assert adapter.to_native() is None
    found = answers(base, [adapter, None], [5, 2])
    assert distance(torch.cat(found), torch.cat(wanted)) < TOLERANCE


def test_an_adapter_of_other_layers_or_widths_is_refused() -> None:
    made = extension().Adapter(3)
    with pytest.raises(ValueError, match="no such layer"):
        made.set(3, 0, 64, 64, None, None, None, [])
    with pytest.raises(ValueError, match="output and the down product only"):
        made.set(0, 0, 64, 64, torch.ones(64), None, None, [])
    with pytest.raises(ValueError, match="down must have shape"):
        made.set(0, 0, 64, 64, None, None, None, [(0, torch.ones(2, 63), torch.ones(2, 64))])
    with pytest.raises(ValueError, match="outputs that its product has"):
        made.set(0, 0, 64, 64, None, None, None, [(1, torch.ones(2, 64), torch.ones(2, 64))])
    neck = (torch.ones(2, 64), torch.ones(2), torch.ones(2, 64), torch.ones(64), 3, True)
    with pytest.raises(ValueError, match="ends a branch"):
        made.set(0, 0, 64, 64, None, None, None, [], neck)
    for wrong, message in [
        ((torch.ones(2, 63), *neck[1:]), "down must have shape"),
        ((neck[0], torch.ones(3), *neck[2:]), "down_bias must have shape"),
        ((*neck[:4], 4, True), "activation from 0 to 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            made.set(0, 4, 96, 64, None, None, None, [], wrong)
    base = model()
    assert lower(base)
    (adapter,) = adapters_of(base, ["bitfit"])
    adapter._native = (made,)
    with pytest.raises(ValueError, match="other layers or widths"):
        answers(base, [adapter], [2])
