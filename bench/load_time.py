"""How long does it take to have a model ready, in a fresh process?

SmolLM2 from the page cache, kept in each of several forms; the imports (most of it torch) are apart.

    python bench/load_time.py
    python bench/load_time.py --weights fp32 --rounds 3 --json
"""

from __future__ import annotations

import argparse
import json
import sys

from plait.claims.cards.load_time import load_times
from plait.claims.claim import Measurements, Quantity
from plait.claims.report import report
from plait.errors import PlaitError


def all_forms(forms: list[str], rounds: int) -> Measurements:
    """The load time of every form of the weights, one after the other."""
    quantities: dict[str, Quantity] = {}
    for form in forms:
        yield f"weights={form}"
        measured = yield from load_times(form, rounds)
        quantities |= {f"{name}_{form}": quantity for name, quantity in measured.items()}
    return quantities


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="fp32,bf16,file", help="forms of the weights, as in plait.load")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        result = report(all_forms(options.weights.split(","), options.rounds))
    except PlaitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.to_json(), indent=2) if options.json else result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
