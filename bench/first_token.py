"""How long from starting a program to the first token of its answer, with the model file in the page cache?

A new process each time: imports, loading, and reading a prompt of 20 tokens.

    python bench/first_token.py
    python bench/first_token.py --rounds 1 --sides plait,llama.cpp
"""

from __future__ import annotations

import statistics
import sys
import time

import contest
import texts


def main() -> int:
    parser = contest.parser(__doc__, "plait,llama.cpp,openvino")
    options = parser.parse_args()
    task = contest.Task("20 tokens", texts.prompts([20]), 1)
    contest.RESULTS.mkdir(parents=True, exist_ok=True)
    choice = {"memory": options.memory, "weights": options.weights, "draft": options.draft}
    names = contest.present(options.sides.split(","))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds + 1):
        for name in names[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            with contest.Side(name, [task], options.threads, choice) as side:
                side.ask(task.message())
                # The first round warms the page cache.
                if number:
                    seconds[name].append(time.perf_counter() - start)
    return contest.report(
        "first-token", options.json, "seconds", "start to first token", seconds, statistics.median
    )


if __name__ == "__main__":
    sys.exit(main())
