"""A picture of what the contests measured: bars of medians, and the spread, from `build/bench/*.json`.

python bench/plot.py build/bench/contests.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import contest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", default=str(contest.RESULTS / "contests.svg"))
    options = parser.parse_args()
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("error: needs matplotlib; run `pip install 'plait[plot]'`", file=sys.stderr)
        return 1
    groups: dict[str, dict[str, list[float]]] = {}
    for path in sorted(contest.RESULTS.glob("*.json")):
        for key, values in json.loads(path.read_text()).get("samples", {}).items():
            task, quantity, side = key.split("|")
            groups.setdefault(f"{task}: {quantity}", {})[side] = values
    if not groups:
        print(f"error: no results in {contest.RESULTS}; run a contest first", file=sys.stderr)
        return 1
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(7, 1.6 * len(groups)), layout="constrained", squeeze=False
    )
    for axis, (title, sides) in zip(axes[:, 0], groups.items(), strict=True):
        medians = [statistics.median(values) for values in sides.values()]
        spread = [
            [median - min(values) for median, values in zip(medians, sides.values(), strict=True)],
            [max(values) - median for median, values in zip(medians, sides.values(), strict=True)],
        ]
        axis.barh(
            list(sides), medians, xerr=spread, color=["C1" if s.startswith("plait") else "C0" for s in sides]
        )
        axis.set_title(title, fontsize=9)
        axis.invert_yaxis()
    figure.savefig(options.output)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
