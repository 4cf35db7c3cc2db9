"""What a claim is: a sentence, the bars it must clear, and how it is measured from scratch."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, ParamSpec, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from plait.errors import ConfigError, PlaitError
from plait.files import write_bytes

__all__ = ["Bar", "Claim", "MeasurementError", "Measurements", "Quantity", "Run"]

T = TypeVar("T")
P = ParamSpec("P")


class MeasurementError(PlaitError):
    """A measurement means nothing: two sides disagree that should not, or a process of it died."""


@dataclass(frozen=True)
class Quantity:
    """A number that was measured.

    Args:
        value: the number; the median where it was taken several times.
        unit: such as `s` or `tokens/s`; empty for a plain number.
        spread: lowest and highest value where it was taken several times.
        samples: how often it was taken, or how many cases it summarises.
    """

    value: float
    unit: str
    spread: tuple[float, float] | None = None
    samples: int | None = None

    @classmethod
    def median(cls, samples: Sequence[float], unit: str) -> Self:
        """The median of repeated measurements, with their spread; at least one is needed."""
        return cls(statistics.median(samples), unit, (min(samples), max(samples)), len(samples))

    @classmethod
    def largest(cls, samples: Sequence[float], unit: str) -> Self:
        """The largest of several values, at least one; NaN if any of them is, which `max` would hide."""
        value = math.nan if any(math.isnan(sample) for sample in samples) else max(samples)
        return cls(value, unit, samples=len(samples))


_PART = TypeAdapter(dict[str, Quantity])


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a measured quantity must reach.

    Args:
        quantity: name of the quantity.
        relation: `>=` or `<=`.
        value: the limit.
        unit: that of the quantity.
        why: one sentence on why the bar stands where it does.
    """

    quantity: str
    relation: Literal[">=", "<="]
    value: float
    unit: str
    why: str

    def holds(self, quantity: Quantity) -> bool:
        """Whether the quantity reaches the bar."""
        if self.relation == ">=":
            return quantity.value >= self.value
        return quantity.value <= self.value


@dataclass(frozen=True)
class Run:
    """How a claim is measured.

    Args:
        quick: measure a small part, to see that everything works. The result is marked and never stored.
        seed: of every random choice.
        parts: folder where a measurement of an hour may keep what is done, so that the next run goes on where this one
            was stopped; None to keep nothing.
    """

    quick: bool = False
    seed: int = 0
    parts: Path | None = None

    def pick(self, full: T, quick: T) -> T:
        """The first for a full run, the second for a quick one."""
        return quick if self.quick else full

    def once(
        self, part: str, measure: Callable[P, dict[str, Quantity]], *args: P.args, **kwargs: P.kwargs
    ) -> dict[str, Quantity]:
        """What a part of the measurement finds, or what it found in a run that was stopped later.

        Args:
            part: a name in the words of a file name, another for each part of a claim.
            measure: measures it from its beginning, with the other arguments.

        Raises:
            ConfigError: what the earlier run left is damaged.
        """
        kept = None if self.parts is None else self.parts / f"{part}.json"
        if kept is not None and kept.exists():
            try:
                return _PART.validate_json(kept.read_bytes(), strict=True)
            except ValidationError:
                raise ConfigError(
                    f"{kept} is damaged. Remove it, so that this part is measured again."
                ) from None
        found = measure(*args, **kwargs)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(kept, _PART.dump_json(found))
        return found


# A measurement yields a line now and then about how far it is, and returns its quantities by name.
Measurements = Generator[str, None, dict[str, Quantity]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence about Plait that anybody can measure again.

    To add one: one file in `plait/claims/cards/`, named after the claim, that holds a `CLAIM`. Heavy
    imports belong inside its functions.

    Args:
        name: lower-case words joined by hyphens.
        title: a few words.
        source: the paper that the claim comes from, or None.
        headline: the sentence that is claimed; for a published system, the paper's own, with its setting.
        scale: what is run here, and how.
        bars: what the measured quantities must reach, at least one.
        measure: measures from scratch.
        needs: modules that only `pip install 'plait[test]'` brings.

    Raises:
        ConfigError: a name of another form, no bar, or two bars for one side of one quantity.
    """

    name: str
    title: str
    headline: str
    scale: str
    bars: tuple[Bar, ...]
    measure: Callable[[Run], Measurements]
    source: str | None = None
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise ConfigError(f"Claim.name must be lower-case words joined by hyphens. Got {self.name!r}.")
        sides = [(bar.quantity, bar.relation) for bar in self.bars]
        if not sides or len(set(sides)) != len(sides):
            raise ConfigError(f"Claim {self.name} needs at least one bar, and each only once. Got {sides}.")
