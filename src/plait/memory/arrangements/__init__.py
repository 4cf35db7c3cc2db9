"""Who shares a strand, and at which positions: packs of sequences and contexts that are read in parallel."""

from __future__ import annotations

from plait.memory.arrangements.packing import PackingMethod, pack
from plait.memory.arrangements.parallel import ParallelGroup

__all__ = ["PackingMethod", "ParallelGroup", "pack"]
