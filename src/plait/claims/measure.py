"""Running a claim: from a card to a result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from plait import __version__
from plait.claims.claim import Claim, MeasurementError, Quantity, Run
from plait.claims.machine import Machine
from plait.claims.result import Judgement, Result
from plait.errors import DownloadError, MissingExtraError, PlaitError, import_extra

__all__ = ["follow", "run_claim"]

T = TypeVar("T")


def follow(steps: Generator[str, None, T], progress: Callable[[str], None]) -> T:
    """Exhaust a measurement, telling `progress` each line, and return what it returns."""
    while True:
        try:
            line = next(steps)
        except StopIteration as end:
            value: T = end.value
            return value
        progress(line)


def run_claim(claim: Claim, run: Run, progress: Callable[[str], None]) -> Result:
    """Measure a claim from scratch and judge it. An error inside makes the verdict `failed`.

    Raises:
        MissingExtraError: a package that the claim needs is not installed; nothing was measured.
        DownloadError: a model that the claim needs could not be brought; nothing was measured.
    """
    for module in claim.needs:
        import_extra(module, extra="test", purpose=f"The claim {claim.name}")
    start = time.monotonic()
    quantities: dict[str, Quantity] = {}
    judgements: tuple[Judgement, ...] = ()
    error = None
    try:
        quantities = follow(claim.measure(run), progress)
        judgements = _judge(claim, quantities)
    except (MissingExtraError, DownloadError):
        raise
    except Exception as failure:  # noqa: BLE001 - whatever goes wrong inside is the claim's failure
        quantities, error = {}, _sentence(failure)
    return Result(
        claim=claim.name,
        plait=__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.monotonic() - start, 3),
        machine=Machine.this(),
        scale=claim.scale,
        quick=run.quick,
        quantities=quantities,
        judgements=judgements,
        error=error,
    )


def _judge(claim: Claim, quantities: Mapping[str, Quantity]) -> tuple[Judgement, ...]:
    for name, quantity in quantities.items():
        if not all(math.isfinite(value) for value in (quantity.value, *(quantity.spread or ()))):
            raise MeasurementError(f"{name} was measured as {quantity.value}, which is not a finite number.")
    for bar in claim.bars:
        if bar.quantity not in quantities:
            raise MeasurementError(f"{bar.quantity} has a bar but was not measured.")
        if quantities[bar.quantity].unit != bar.unit:
            raise MeasurementError(
                f"{bar.quantity} was measured in {quantities[bar.quantity].unit!r}, but its bar is in {bar.unit!r}."
            )
    return tuple(Judgement(bar=bar, holds=bar.holds(quantities[bar.quantity])) for bar in claim.bars)


def _sentence(failure: Exception) -> str:
    """An error in one line; the kind of error too where its author did not write for a reader."""
    lines = str(failure).strip().splitlines() or [""]
    if isinstance(failure, PlaitError):
        return lines[0]
    return f"{type(failure).__name__}: {lines[0]}".removesuffix(": ")
