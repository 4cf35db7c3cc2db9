"""Claims: sentences about Plait that anybody can measure again, and the ledger of what was measured."""

from __future__ import annotations

from plait.claims.claim import Bar, Claim, MeasurementError, Measurements, Quantity, Run
from plait.claims.ledger import Row, read_ledger
from plait.claims.machine import Machine
from plait.claims.measure import follow, run_claim
from plait.claims.page import full_page, short_ledger, with_short_ledger
from plait.claims.registry import all_claims, find_claim
from plait.claims.result import Judgement, Result
from plait.claims.store import Store

__all__ = [
    "Bar",
    "Claim",
    "Judgement",
    "Machine",
    "MeasurementError",
    "Measurements",
    "Quantity",
    "Result",
    "Row",
    "Run",
    "Store",
    "all_claims",
    "find_claim",
    "follow",
    "full_page",
    "read_ledger",
    "run_claim",
    "short_ledger",
    "with_short_ledger",
]
