"""One list for each axis of memory; every entry meets every entry of the other axes in `test_memory_matrix`.

A new codec or policy is added here, with what a query sees under it or how far it may move an output.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory_oracle import TOLERANCE, Distance, Sees, TokenTable, everything, storage_bound

from plait.memory import Heads, MemoryPlan
from plait.memory.policies import PrFlash


@dataclass(frozen=True)
class CodecEntry:
    """A codec and the rounding of what it stores: relative, and in steps of a group of numbers.

    In the channels `dead` all keys are 0, so that a codec that drops the right ones loses nothing; with `quiet` so
    does one that drops the tokens nobody attends to.
    """

    spec: str
    unit: float = 0.0
    step: float = 0.0
    dead: tuple[int, ...] = ()
    quiet: bool = False

    def table(self, heads: Heads) -> TokenTable:
        """Tokens of which this codec loses no more than it says."""
        return TokenTable(heads, dead=self.dead, quiet=self.quiet)

    def tolerance(self, table: TokenTable) -> float:
        """How far outputs may be from exact attention."""
        return storage_bound(table, self.unit, self.step) if self.unit or self.step else TOLERANCE


@dataclass(frozen=True)
class PolicyEntry:
    """A policy, which keys a query sees under it, and at which distance; None for the true one.

    One that `cuts` sees the past in pieces, and whole what cannot be cut.
    """

    spec: str
    sees: Sees
    distance: Distance | None = None
    cuts: bool = False


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
    # A low-rank part of full rank takes all of the error back, up to fp16.
    CodecEntry("gear:bits=4,group=4,buffer=8,rank=8,rank_decode=8,sparsity=0.3", unit=2**-11),
    # Numbers of the table lie within 4 of 0, so 8 bits are steps of at most 8 / 255.
    CodecEntry("gear:bits=8,backbone=kcvt,buffer=5,rank=0,rank_decode=0,sparsity=0,sinks=3", step=4 / 255),
    CodecEntry("saq:steps=4@16/rest@8,group=4", unit=2**-11, step=4 / 255),
    CodecEntry("saq:steps=8@16/rest@8,group=8,sink=8@16", unit=2**-11, step=4 / 255),
    # A rotary pair of channels without keys: a quarter of the 8.
    CodecEntry("think:ratio=0.25,recent=3,window=2,chunk=2", dead=(3, 7)),
    CodecEntry("think:ratio=0.25,recent=5,chunk=3,sinks=2,dense:dtype=fp16", unit=2**-11, dead=(3, 7)),
    CodecEntry(
        "think:ratio=0.25,recent=3,chunk=8,gear:group=4,buffer=8,rank=6,rank_decode=6,sparsity=0",
        unit=2**-11,
        dead=(3, 7),
    ),
    # Of the first 40 tokens of the tests less than 16 are attended to.
    CodecEntry("snapkv:capacity=24,window=8,kernel=1,chunk=8", quiet=True),
    CodecEntry(
        "snapkv:capacity=24,window=8,kernel=1,chunk=6,sinks=2,think:ratio=0.25,window=2",
        dead=(3, 7),
        quiet=True,
    ),
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
    PolicyEntry(spec, drawn(spec), cuts=True)
    for spec in ("prflash:block=4", "prflash:block=3,p=floor,rate=0.3,near=2,mode=bernoulli,sink_blocks=0")
]
MODEL_WINDOWS = [None, 5]
