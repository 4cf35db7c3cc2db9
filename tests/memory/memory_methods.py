"""One list for each axis of memory; every entry meets every entry of the other axes in `test_memory_matrix`.

A new codec or policy is added here, with what a query sees under it or how far it may move an output.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory_oracle import TOLERANCE, Sees, TokenTable, everything, storage_bound


@dataclass(frozen=True)
class CodecEntry:
    """A codec and the rounding of what it stores: relative, and in steps of a group of numbers.

    In the channels `dead` all keys are 0, so that a codec that drops the right ones loses nothing.
    """

    spec: str
    unit: float = 0.0
    step: float = 0.0
    dead: tuple[int, ...] = ()

    def tolerance(self, table: TokenTable) -> float:
        """How far outputs may be from exact attention."""
        return storage_bound(table, self.unit, self.step) if self.unit or self.step else TOLERANCE


@dataclass(frozen=True)
class PolicyEntry:
    """A policy and which keys a query sees under it."""

    spec: str
    sees: Sees


def first_and_last(size: int, sinks: int) -> Sees:
    """What the window policy promises."""
    return lambda query, key: key < sinks or query - key < size


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
]
POLICY_ENTRIES = [
    PolicyEntry("full", everything),
    PolicyEntry("window:size=7,sinks=3", first_and_last(7, 3)),
    PolicyEntry("window:size=1,sinks=0", first_and_last(1, 0)),
]
MODEL_WINDOWS = [None, 5]
