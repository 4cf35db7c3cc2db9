"""What is learned: one file an objective."""

from __future__ import annotations

from plait.train.objectives.base import OBJECTIVES, Loss, Objective
from plait.train.objectives.deviation_aware import DeviationAware
from plait.train.objectives.distillation import Distillation
from plait.train.objectives.lexical_units import LexicalUnits
from plait.train.objectives.next_token import NextToken

__all__ = ["OBJECTIVES", "DeviationAware", "Distillation", "LexicalUnits", "Loss", "NextToken", "Objective"]
