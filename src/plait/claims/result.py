"""What one run of a claim measured, and its form as a JSON file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from plait.claims.claim import Bar, Quantity
from plait.claims.machine import Machine
from plait.errors import ConfigError

__all__ = ["SCHEMA", "Judgement", "Result", "Verdict"]

# Raised whenever a field changes its meaning; files of another schema are refused.
SCHEMA = 1

Verdict = Literal["holds", "misses", "failed"]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A bar as it stood in a run, and whether the run reached it."""

    bar: Bar
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run of a claim measured.

    Args:
        claim: name of the claim.
        plait: version of Plait.
        date: when the run ended, UTC, `YYYY-MM-DDTHH:MM:SSZ`.
        seconds: how long it took.
        machine: where.
        scale: what was run, in the claim's words.
        quick: whether only a small part was run, which proves nothing.
        quantities: what was measured; empty when the run failed.
        judgements: each bar of the claim; empty when the run failed.
        error: why the run failed, in one sentence; None when it did not.
    """

    claim: str
    plait: str
    date: str
    seconds: float
    machine: Machine
    scale: str
    quick: bool
    quantities: dict[str, Quantity]
    judgements: tuple[Judgement, ...]
    error: str | None = None

    @property
    def verdict(self) -> Verdict:
        """`failed` without a measurement, `misses` when a bar was not reached, else `holds`."""
        if self.error is not None:
            return "failed"
        return "holds" if all(judgement.holds for judgement in self.judgements) else "misses"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; `parse` reads it back from text."""
        return {"schema": SCHEMA, "verdict": self.verdict, "result": dataclasses.asdict(self)}

    def text(self) -> str:
        """The content of a result file."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> Result:
        """Read a result file.

        Raises:
            ConfigError: it is not JSON of this schema, or its verdicts do not follow from its numbers.
        """
        try:
            document = _ADAPTER.validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{place + ': ' if place else ''}{first['msg']}") from None
        result = document.result
        for judgement in result.judgements:
            quantity = result.quantities.get(judgement.bar.quantity)
            if quantity is None or judgement.bar.holds(quantity) != judgement.holds:
                raise ConfigError(f"judgements: the verdict on {judgement.bar.quantity} does not follow")
        if result.verdict != document.verdict or (result.error is None and not result.judgements):
            raise ConfigError("verdict: it does not follow from the bars")
        return result


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
@dataclass(frozen=True)
class _Document:
    """The whole of a result file."""

    schema: Literal[1]
    verdict: Verdict
    result: Result


_ADAPTER = TypeAdapter(_Document)
