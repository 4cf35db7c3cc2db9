"""How packed models are tuned: numbers alone, or codes too."""

from __future__ import annotations

from plait.train.tuners.base import TUNERS, Tuner
from plait.train.tuners.pv import PV
from plait.train.tuners.straight_through import StraightThrough
from plait.train.tuners.values import Values

__all__ = ["PV", "TUNERS", "StraightThrough", "Tuner", "Values"]
