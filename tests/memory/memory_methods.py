"""One list for each axis of memory; every entry meets every entry of the other axes in `test_memory_matrix`.

A new codec or policy is added here, with what a query sees under it or how far it may move an output.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory_oracle import TOLERANCE, Distance, Sees, TokenTable, everything, storage_bound

from plait.memory import MemoryPlan
from plait.memory.policies import PrFlash


@dataclass(frozen=True)
class CodecEntry:
    """A codec and the relative rounding of what it stores."""

    spec: str
    unit: float = 0.0

    def tolerance(self, table: TokenTable) -> float:
        """How far outputs may be from exact attention."""
        return storage_bound(table, self.unit) if self.unit else TOLERANCE


@dataclass(frozen=True)
class PolicyEntry:
    """A policy, which keys a query sees under it, and at which distance; None for the true one."""

    spec: str
    sees: Sees
    distance: Distance | None = None


def first_and_last(size: int, sinks: int) -> Sees:
    """What the window policy promises."""
    return lambda query, key: key < sinks or query - key < size


def at_most(limit: int) -> Distance:
    """The true distance up to a limit."""
    return lambda query, key: min(query - key, limit)


def in_the_cache(local: int, initial: int) -> Distance:
    """What the streaming style promises: a query stands at the end of a full cache."""
    last = local + initial - 1
    return lambda query, key: query - key if key >= initial else min(query, last) - key


def drawn(spec: str) -> Sees:
    """The blocks that a policy says it keeps."""
    policy = MemoryPlan.parse(spec).policy
    assert isinstance(policy, PrFlash)
    size = policy.block
    return lambda query, key: key // size in policy.kept(0, query // size)


def both(one: Sees, other: Sees) -> Sees:
    """A key that both let through."""
    return lambda query, key: one(query, key) and other(query, key)


CODEC_ENTRIES = [
    CodecEntry("dense"),
    CodecEntry("dense:dtype=bf16", unit=2**-8),
    CodecEntry("dense:dtype=fp16", unit=2**-11),
]
POLICY_ENTRIES = [
    PolicyEntry("full", everything),
    PolicyEntry("window:size=7,sinks=3", first_and_last(7, 3)),
    PolicyEntry("window:size=1,sinks=0", first_and_last(1, 0)),
    PolicyEntry("lm-infinite:local=7,initial=3", first_and_last(7, 3), at_most(7)),
    PolicyEntry("lm-infinite:local=4,initial=0", first_and_last(4, 0)),
    PolicyEntry("lm-infinite:local=6,initial=2,style=streaming", first_and_last(6, 2), in_the_cache(6, 2)),
]
POLICY_ENTRIES += [
    # Every block is retrieved, so that nothing is forgotten.
    PolicyEntry("infllm:local=7,initial=3,block=4,topk=99,cached=99,execution=5", everything, at_most(6)),
    PolicyEntry(
        "infllm:local=6,initial=0,block=3,topk=99,cached=99,execution=6,representatives=2,cold=file",
        everything,
        at_most(5),
    ),
]
POLICY_ENTRIES += [
    PolicyEntry(spec, drawn(spec))
    for spec in ("prflash:block=4", "prflash:block=3,p=floor,rate=0.3,near=2,mode=bernoulli,sink_blocks=0")
]
MODEL_WINDOWS = [None, 5]
