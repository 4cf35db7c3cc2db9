"""A measurement outside the ledger, with everything that is needed to read its numbers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from plait import __version__
from plait.claims.claim import Measurements, Quantity
from plait.claims.ledger import quantity_text
from plait.claims.machine import Machine
from plait.claims.measure import follow

__all__ = ["Report", "report"]


class Report(NamedTuple):
    """What was measured, with which Plait, and where."""

    plait: str
    machine: Machine
    quantities: Mapping[str, Quantity]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "plait": self.plait,
            "machine": dataclasses.asdict(self.machine),
            "quantities": {name: dataclasses.asdict(q) for name, q in self.quantities.items()},
        }

    def __str__(self) -> str:
        width = max((len(name) for name in self.quantities), default=0)
        lines = [
            f"{name.replace('_', ' '):<{width}}  {quantity_text(quantity)}"
            for name, quantity in self.quantities.items()
        ]
        return "\n".join([f"Plait {self.plait} on {self.machine}", *lines])


def report(measurements: Measurements) -> Report:
    """Measure, with progress on stderr.

    Raises:
        MeasurementError: the measurement means nothing.
    """
    quantities = follow(measurements, lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
    return Report(__version__, Machine.this(), quantities)
