"""Mixers: how tokens exchange information. One file each."""

from __future__ import annotations

from plait.nn.mixers.attention import Attention, AttentionConfig
from plait.nn.mixers.base import Mixer
from plait.nn.mixers.linear_attention import LinearAttention, LinearAttentionConfig

__all__ = ["Attention", "AttentionConfig", "LinearAttention", "LinearAttentionConfig", "Mixer"]
