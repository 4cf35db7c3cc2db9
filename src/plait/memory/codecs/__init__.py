"""Codecs: how strands are stored. One file each."""

from __future__ import annotations

from plait.memory.codecs.dense import Dense

__all__ = ["Dense"]
