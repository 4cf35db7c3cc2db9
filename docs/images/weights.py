"""Draw quality against bytes of weight formats, docs/images/weights.svg, from what was measured.

`plait eval weights smollm2 -f ... --json > docs/images/weights.json` measures; `python docs/images/weights.py` draws.
"""

from __future__ import annotations

import json
from pathlib import Path

from plait.cli.evaluate_weights import draw
from plait.engine.weight_quality import Quality
from plait.evaluation.weights import WeightRow

HERE = Path(__file__).parent


def rows() -> list[WeightRow]:
    """The rows of the file of measurements."""
    measured = json.loads((HERE / "weights.json").read_text("utf-8"))
    return [
        WeightRow(
            one["name"],
            Quality(one["nats"], one["divergence"], one["agreement"], one["tokens"]),
            one["file_bytes"],
            one["held_bytes"],
            one["bits_per_weight"],
            one["tokens_per_second"],
        )
        for one in measured
    ]


if __name__ == "__main__":
    draw(rows(), HERE / "weights.svg")
