"""Speculation: guesses that a speculator makes, and the one lossless verifier. One file a method."""

from __future__ import annotations

from plait.decode.speculate.base import SPECULATORS, Nothing, Speculator, SpeculatorConfig
from plait.decode.speculate.budget import Account, DraftBudget, Mode, PassTimes, Proposal, Step
from plait.decode.speculate.chain import Chain
from plait.decode.speculate.draft_model import DraftModelConfig, DraftModelSpeculator
from plait.decode.speculate.lud import LUD
from plait.decode.speculate.mix import Mix
from plait.decode.speculate.pearl import PEARL
from plait.decode.speculate.prompt_lookup import PromptLookup
from plait.decode.speculate.rejection import Rejection
from plait.decode.speculate.rsd_c import RSDC
from plait.decode.speculate.rsd_s import RSDS
from plait.decode.speculate.token_recycling import TokenRecycling
from plait.decode.speculate.tree import Context, Tree
from plait.decode.speculate.verify import verify

__all__ = [
    "LUD",
    "PEARL",
    "RSDC",
    "RSDS",
    "SPECULATORS",
    "Account",
    "Chain",
    "Context",
    "DraftBudget",
    "DraftModelConfig",
    "DraftModelSpeculator",
    "Mix",
    "Mode",
    "Nothing",
    "PassTimes",
    "PromptLookup",
    "Proposal",
    "Rejection",
    "Speculator",
    "SpeculatorConfig",
    "Step",
    "TokenRecycling",
    "Tree",
    "verify",
]
