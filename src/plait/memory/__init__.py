"""The past as strands: how it is stored, which parts a query sees, and the exact merge of the parts."""

from __future__ import annotations

from plait.memory.fold import attend
from plait.memory.memory import Memory
from plait.memory.past import Past
from plait.memory.plan import (
    CODECS,
    POLICIES,
    Choice,
    Codec,
    MemoryPlan,
    Notes,
    Policy,
    Seen,
    Visit,
    Watcher,
)
from plait.memory.rows import Rows, Segment, Turn, check_pasts, in_order, turns_of
from plait.memory.state import LinearState, State
from plait.memory.strand import DenseStrand, FrozenStrand, Heads, Strand, allocated_bytes
from plait.ops import Causal, Everything, Mask, Partial, Tree, empty_partial, merge, merge_all

# The methods register themselves; they import the base classes above.
from plait.memory import arrangements, codecs, policies  # isort: skip

__all__ = [
    "CODECS",
    "POLICIES",
    "Causal",
    "Choice",
    "Codec",
    "DenseStrand",
    "Everything",
    "FrozenStrand",
    "Heads",
    "LinearState",
    "Mask",
    "Memory",
    "MemoryPlan",
    "Notes",
    "Partial",
    "Past",
    "Policy",
    "Rows",
    "Seen",
    "Segment",
    "State",
    "Strand",
    "Tree",
    "Turn",
    "Visit",
    "Watcher",
    "allocated_bytes",
    "arrangements",
    "attend",
    "check_pasts",
    "codecs",
    "empty_partial",
    "in_order",
    "merge",
    "merge_all",
    "policies",
    "turns_of",
]
