"""Model families: how each names its settings and its tensors. One file each."""

from __future__ import annotations

from plait.nn.families.base import Family, Settings, from_gguf_metadata
from plait.nn.families.llama import LLAMA

__all__ = ["FAMILIES", "Family", "Settings", "from_gguf_metadata"]

FAMILIES: tuple[Family, ...] = (LLAMA,)
