"""From a name to a model, in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

from plait.claims.claim import Bar, Claim, MeasurementError, Measurements, Quantity

__all__ = ["CLAIM", "load_times"]

_CHILD = """
import json, sys, time
start = time.perf_counter()
import plait.engine
imported = time.perf_counter()
plait.engine.load("smollm2", weights=sys.argv[1], offline=True)
loaded = time.perf_counter()
print(json.dumps([imported - start, loaded - imported]))
"""


def _fresh_process(weights: str) -> tuple[float, float]:
    """Seconds of the imports and of `load`, in a new process."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, weights], capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise MeasurementError(f"A fresh process could not load smollm2: {last}")
    importing, loading = json.loads(child.stdout)
    return float(importing), float(loading)


def load_times(weights: str, rounds: int) -> Measurements:
    """Seconds of `load`, and of the imports before it, in fresh processes with a warm page cache.

    Args:
        weights: how matrices are kept, as in `load`.
        rounds: how often, after one warm-up.
    """
    from plait.hub import resolve

    yield "warming the page cache"
    resolve("smollm2").read_bytes()
    _fresh_process(weights)
    seconds = []
    for number in range(rounds):
        yield f"load {number + 1} of {rounds}"
        seconds.append(_fresh_process(weights))
    importing, loading = zip(*seconds, strict=True)
    return {"load": Quantity.median(loading, "s"), "imports": Quantity.median(importing, "s")}


CLAIM = Claim(
    name="load-time",
    title="A model is ready at once",
    headline="plait.load('smollm2') has a model ready within two seconds.",
    scale=(
        "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised to fp32) from the page cache, each time in a fresh "
        "process; the imports, of which torch is most, are measured apart. Median of 5 after one warm-up."
    ),
    bars=(
        Bar(
            quantity="load",
            relation="<=",
            value=2.0,
            unit="s",
            why="A prompt typed at the command line should be answered before one looks away.",
        ),
    ),
    measure=lambda run: load_times("fp32", rounds=run.pick(5, 1)),
)
