"""The ledger: every claim beside what was measured, as rows and as short texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from plait.claims.claim import Bar, Claim, Quantity
from plait.claims.result import Result
from plait.claims.store import Store

__all__ = ["Row", "bar_text", "measured_text", "number", "quantity_text", "read_ledger"]

State = Literal["holds", "misses", "failed", "outdated", "not run here"]


class Row(NamedTuple):
    """A claim and its last result in a folder."""

    claim: Claim
    result: Result | None

    @property
    def state(self) -> State:
        """The verdict; `outdated` when the claim has since changed its bars or its scale."""
        if self.result is None:
            return "not run here"
        if self.result.scale != self.claim.scale:
            return "outdated"
        if self.result.error is None and tuple(j.bar for j in self.result.judgements) != self.claim.bars:
            return "outdated"
        return self.result.verdict

    @property
    def day(self) -> str:
        """The date of the run, or nothing."""
        return "" if self.result is None else self.result.date[:10]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "claim": self.claim.name,
            "title": self.claim.title,
            "headline": self.claim.headline,
            "scale": self.claim.scale,
            "source": self.claim.source,
            "bars": [dataclasses.asdict(bar) for bar in self.claim.bars],
            "state": self.state,
            "result": None if self.result is None else self.result.to_json()["result"],
        }


def read_ledger(claims: Iterable[Claim], store: Store) -> list[Row]:
    """A row for each claim.

    Raises:
        ConfigError: a result file is damaged.
    """
    return [Row(claim, store.read(claim)) for claim in claims]


def number(value: float) -> str:
    """Three significant digits, or every digit before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def quantity_text(quantity: Quantity) -> str:
    """A quantity with its unit, spread and number of samples, such as `41 tokens/s (40 to 43, 5 samples)`."""
    text = f"{number(quantity.value)} {quantity.unit}".strip()
    notes = []
    if quantity.spread is not None and quantity.samples != 1:
        notes.append(f"{number(quantity.spread[0])} to {number(quantity.spread[1])}")
    if quantity.samples not in (None, 1):
        notes.append(f"{quantity.samples:,} samples")
    return f"{text} ({', '.join(notes)})" if notes else text


def bar_text(bar: Bar) -> str:
    """A limit, such as `<= 2 s`."""
    return f"{bar.relation} {number(bar.value)} {bar.unit}".strip()


def measured_text(row: Row) -> str:
    """The quantities of a result that have a bar, or why there are none."""
    if row.result is None:
        return ""
    if row.result.error is not None:
        return row.result.error
    return "; ".join(
        f"{judgement.bar.quantity.replace('_', ' ')} "
        f"{number(row.result.quantities[judgement.bar.quantity].value)} {judgement.bar.unit}".strip()
        + f" (bar {bar_text(judgement.bar)})"
        for judgement in row.result.judgements
    )
