"""Mixers: how tokens exchange information. One file each."""

from __future__ import annotations

from plait.nn.mixers.attention import Attention, AttentionConfig
from plait.nn.mixers.base import Mixer

__all__ = ["Attention", "AttentionConfig", "Mixer"]
