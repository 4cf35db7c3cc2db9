"""Train what codes stand for and leave the codes: the P step of PV-Tuning alone."""

from __future__ import annotations

from dataclasses import dataclass

from plait.train.tuners.base import Tuner

__all__ = ["Values"]


@dataclass(frozen=True, kw_only=True)
class Values(Tuner, name="values"):
    """Scales, zeros, codebooks and norms are trained; every weight keeps its code. The cheapest way, and a strong one."""
