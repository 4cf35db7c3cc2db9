"""Model families: how each names its settings and its tensors. One file each."""

from __future__ import annotations

from plait.nn.families.base import Family
from plait.nn.families.gemma import GEMMA2, GEMMA3
from plait.nn.families.gguf import from_gguf
from plait.nn.families.gpt2 import GPT2
from plait.nn.families.llama import LLAMA
from plait.nn.families.opt import OPT
from plait.nn.families.phi3 import PHI3
from plait.nn.families.plait import PLAIT
from plait.nn.families.qwen import QWEN2, QWEN3
from plait.nn.families.settings import Settings
from plait.nn.families.starcoder2 import STARCODER2

__all__ = ["FAMILIES", "Family", "Settings", "from_gguf"]

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GPT2, STARCODER2, OPT, PLAIT)
