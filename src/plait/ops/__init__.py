"""Numerical primitives, each with one torch reference and, where built, one native form."""

from __future__ import annotations

from plait.ops.reference import linear

__all__ = ["linear"]
