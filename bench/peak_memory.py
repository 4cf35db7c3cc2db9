"""How much memory does a process need at its peak, with 2,000 tokens of context?

The largest resident memory of a process that loads the model, reads a prompt and writes 16 tokens. `plait` includes
Python and torch; `baseline` is a process that has only imported them.

    python bench/peak_memory.py
    python bench/peak_memory.py --length 500 --rounds 1
"""

from __future__ import annotations

import statistics
import subprocess
import sys

import contest
import texts

BASELINE = "import resource, torch; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


def main() -> int:
    parser = contest.parser(__doc__, "plait,llama.cpp,openvino")
    parser.add_argument("--length", type=int, default=2000, help="tokens of the prompt")
    parser.set_defaults(rounds=1)
    options = parser.parse_args()
    task = contest.Task(f"{options.length} tokens", texts.prompts([options.length]), 16)
    contest.RESULTS.mkdir(parents=True, exist_ok=True)
    choice = {"memory": options.memory, "weights": options.weights, "draft": options.draft}
    peaks: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        found = subprocess.run([sys.executable, "-c", BASELINE], capture_output=True, text=True, check=True)
        peaks.setdefault("baseline", []).append(int(found.stdout) / 1e6)
        for name in contest.present(options.sides.split(",")):
            with contest.Side(name, [task], options.threads, choice) as side:
                peaks.setdefault(name, []).append(side.ask(task.message())["peak"] / 1e6)
    return contest.report(
        "peak-memory", options.json, "MB", f"peak at {options.length} tokens", peaks, statistics.median
    )


if __name__ == "__main__":
    sys.exit(main())
