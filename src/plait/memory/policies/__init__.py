"""Policies: which strands a query sees. One file each."""

from __future__ import annotations

from plait.memory.policies.full import Full
from plait.memory.policies.infllm import InfLLM
from plait.memory.policies.lm_infinite import LMInfinite
from plait.memory.policies.prflash import PrFlash
from plait.memory.policies.window import Window

__all__ = ["Full", "InfLLM", "LMInfinite", "PrFlash", "Window"]
