"""Three claims that stand in for real ones: one holds, one misses its bar, one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import plait.claims
from plait.claims import Bar, Claim, MeasurementError, Measurements, Quantity, Run, registry

__all__ = ["CLAIMS", "claim_of", "only", "speed_of"]


def speed_of(value: float) -> Callable[[Run], Measurements]:
    """A measurement that always finds the same speed."""

    def measure(run: Run) -> Measurements:
        yield "half way"
        return {"speed": Quantity.median([value - 1, value, value + 1], "tokens/s"), "rows": Quantity(3, "")}

    return measure


def breaks(run: Run) -> Measurements:
    """A measurement that finds both sides different."""
    yield "before"
    raise MeasurementError("Both sides differ from token 7 on.")


def claim_of(name: str, measure: Callable[[Run], Measurements], *, at_least: float = 10.0) -> Claim:
    """A claim with one bar, on a speed."""
    return Claim(
        name=name,
        title=f"About {name}",
        headline=f"The {name} tortoise | wins.",
        scale="A track of 100 m.",
        bars=(Bar(quantity="speed", relation=">=", value=at_least, unit="tokens/s", why="Hares sleep."),),
        measure=measure,
    )


CLAIMS = {
    "broken": claim_of("broken", breaks),
    "fast": claim_of("fast", speed_of(12.0)),
    "slow": claim_of("slow", speed_of(8.0)),
}


@contextmanager
def only(claims: dict[str, Claim]) -> Iterator[None]:
    """Let these be all the claims there are."""
    real = registry.all_claims
    registry.all_claims = plait.claims.all_claims = lambda: claims  # type: ignore[assignment]
    try:
        yield
    finally:
        registry.all_claims = plait.claims.all_claims = real
