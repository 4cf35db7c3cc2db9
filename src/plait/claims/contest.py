"""A speed contest between Plait and Transformers: interleaved rounds, equal texts or no speed at all.

Each side is a process of its own, so that neither thread pool nor allocator of one disturbs the other;
while one works, the others wait.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from plait.claims.claim import MeasurementError, Quantity
from plait.claims.machine import memory_bandwidth

__all__ = ["Contestant", "Race", "decode_contest"]


@dataclass(frozen=True)
class Race:
    """What every side is given.

    Args:
        name: of the quantities, such as `batch_8`.
        prompts: token ids; the lengths may differ.
        max_new_tokens: tokens of every continuation, at least 2.
    """

    name: str
    prompts: list[list[int]]
    max_new_tokens: int


class Contestant:
    """One side of the contest.

    Args:
        name: of the quantities, such as `plait`.
        side: `plait` or `transformers`.
        threads: threads that it may use.
        environment: variables that differ from those of this process.

    Raises:
        MeasurementError: its process could not load the model, or died later.
    """

    def __init__(self, name: str, side: str, threads: int, environment: dict[str, str] | None = None) -> None:
        self.name = name
        # A pipe would block a side that says much; a file does not.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "plait.claims.contestant", side, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def wait_until_ready(self) -> int:
        """Bytes of the weights, once they are loaded."""
        return int(self._answer()["weight_bytes"])

    def run(self, race: Race) -> dict[str, Any]:
        """Generate once: `tokens`, `seconds`, and `decode_seconds`, `_tokens` and `_steps` of pure decoding."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(
                json.dumps({"prompts": race.prompts, "max_new_tokens": race.max_new_tokens}) + "\n"
            )
            self._process.stdin.flush()
        except BrokenPipeError:
            # The reason is in what it wrote; `_answer` reports it.
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise MeasurementError(f"{self.name} died in the contest: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def decode_contest(
    races: Sequence[Race], *, rounds: int, threads: int
) -> Generator[str, None, dict[str, Quantity]]:
    """Tokens per second of Plait and of Transformers on the same prompts, weights and threads.

    Sides take turns in every round, after one round of warm-up; medians over rounds. Sides: Plait as it
    is by default; Plait with torch operations alone; Transformers' `generate`.

    Returns:
        For each race and side `decode` speed (after every prompt was read) and `total` speed (prompts
        included), the ratios of Plait to Transformers, and how fast weights and memory are read.

    Raises:
        MeasurementError: two sides disagree on a token, or a side's process died.
    """
    contestants: list[tuple[str, str, dict[str, str]]] = [
        ("plait", "plait", {}),
        ("plait_torch", "plait", {"PLAIT_NATIVE": "0"}),
        ("transformers", "transformers", {}),
    ]
    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        sides: list[Contestant] = []
        weight_bytes: dict[str, int] = {}
        for name, side, environment in contestants:
            yield f"loading {name.replace('_', ' ')}"
            sides.append(stack.enter_context(Contestant(name, side, threads, environment)))
            # One after the other: the memory for reading a model is needed once only.
            weight_bytes[name] = sides[-1].wait_until_ready()
        for number in range(rounds + 1):
            for race in races:
                label = f"round {number} of {rounds}" if number else "warm-up"
                yield f"{race.name.replace('_', ' ')}, {label}"
                # The order changes from round to round, so that going first helps nobody.
                answers = {side.name: side.run(race) for side in sides[:: 1 if number % 2 else -1]}
                _check_equal(race, {name: answer["tokens"] for name, answer in answers.items()})
                if number:
                    _note(samples, race, answers, weight_bytes)
    quantities = {name: Quantity.median(values, _unit(name)) for name, values in samples.items()}
    quantities["memory_bandwidth"] = Quantity(memory_bandwidth() / 1e9, "GB/s")
    return quantities


def _check_equal(race: Race, tokens: dict[str, list[list[int]]]) -> None:
    (first_name, first), *others = tokens.items()
    for name, other in others:
        for number, (a, b) in enumerate(zip(first, other, strict=True)):
            if a != b:
                place = next(
                    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
                )
                raise MeasurementError(
                    f"{race.name}: {first_name} and {name} differ from new token {place} of prompt {number} on, so "
                    "no speed is reported."
                )


def _note(
    samples: dict[str, list[float]],
    race: Race,
    answers: dict[str, dict[str, Any]],
    weight_bytes: dict[str, int],
) -> None:
    """Add one round's speeds, and its ratios, to the samples."""
    speeds = {
        name: {
            "decode": answer["decode_tokens"] / answer["decode_seconds"],
            "total": sum(len(tokens) for tokens in answer["tokens"]) / answer["seconds"],
        }
        for name, answer in answers.items()
    }
    for name, answer in answers.items():
        for kind, speed in speeds[name].items():
            samples.setdefault(f"{race.name}_{kind}_{name}", []).append(speed)
        read = weight_bytes[name] * answer["decode_steps"] / answer["decode_seconds"] / 1e9
        samples.setdefault(f"{race.name}_weights_read_{name}", []).append(read)
        if name != "transformers":
            for kind, speed in speeds[name].items():
                ratio = speed / speeds["transformers"][kind]
                samples.setdefault(f"{race.name}_{kind}_ratio_{name}", []).append(ratio)


def _unit(name: str) -> str:
    if "_ratio_" in name:
        return "x"
    return "GB/s" if "_weights_read_" in name else "tokens/s"
