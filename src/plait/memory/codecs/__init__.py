"""Codecs: how strands are stored. One file each."""

from __future__ import annotations

from plait.memory.codecs.dense import Dense
from plait.memory.codecs.gear import GEAR
from plait.memory.codecs.snapkv import SnapKV
from plait.memory.codecs.staircase import Staircase
from plait.memory.codecs.think import ThinK

__all__ = ["GEAR", "Dense", "SnapKV", "Staircase", "ThinK"]
