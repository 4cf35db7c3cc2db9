"""What claims about memories rest on: an exact memory moves nothing, a coarse one does, and bytes are counted."""

from __future__ import annotations

import pytest

import plait
from plait.claims import follow
from plait.claims.memories import attention_seconds, fidelity, fp16_bytes
from plait.claims.texts import token_runs
from plait.memory import Heads, MemoryPlan


@pytest.mark.model
def test_only_a_memory_that_loses_something_moves_the_laws() -> None:
    lm = plait.load("smollm2", weights="fp32")
    plans = {
        "exact": MemoryPlan(),
        "observed": MemoryPlan.parse("think:ratio=0"),
        "coarse": MemoryPlan.parse("gear:bits=2,rank=0,rank_decode=0,sparsity=0"),
        "finer": MemoryPlan.parse("gear:bits=4"),
    }
    windows = token_runs(lm.tokenizer, [80, 80])
    found = follow(fidelity(lm, plans, windows, 64), lambda line: None)
    for name in ("exact", "observed"):
        assert max(found[name].divergence) < 1e-9
        assert found[name].agreement == [1.0, 1.0]
        assert found[name].nbytes == [2 * fp16_bytes(lm, 64)] * 2
    for coarse, finer in zip(found["coarse"].divergence, found["finer"].divergence, strict=True):
        assert 0 < finer < coarse
    assert found["coarse"].nbytes[0] < fp16_bytes(lm, 64)


def test_every_memory_is_timed_in_every_round() -> None:
    plans = {spec: MemoryPlan.parse(spec) for spec in ("dense", "think:ratio=0.5,recent=8")}
    steps = attention_seconds(Heads(4, 2, 8, scale=1.0), plans, tokens=200, batch=3, rounds=2, seed=0)
    seconds = follow(steps, lambda line: None)
    assert {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys(plans, 2)
    assert all(second > 0 for taken in seconds.values() for second in taken)
