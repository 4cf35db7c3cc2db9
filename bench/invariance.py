"""What does it cost that a row has the same bits alone, in any batch and in any cut of its prompt?

The same program is built once more, free to add in any order (`PLAIT_ANY_ORDER`), and both take turns.

    python bench/invariance.py
    python bench/invariance.py --rounds 1 --lengths 441
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import contest
import peers
import texts

FREE = "plait-any-order"


def speeds(task: contest.Task, answer: dict[str, Any]) -> dict[str, float]:
    read = sum(map(len, task.prompts)) - task.shared * (len(task.prompts) - 1)
    return {
        "prompt tokens/s": read / answer["first"],
        "decode tokens/s": len(task.prompts) / statistics.median(answer["steps"]),
    }


def main() -> int:
    parser = contest.parser(__doc__, f"plait,{FREE}")
    parser.add_argument("--lengths", default="441,4000", help="tokens of the prompts")
    parser.add_argument("--sequences", type=int, default=16, help="that share a beginning of 1,000 tokens")
    options = parser.parse_args()
    if reason := peers.PEERS[FREE].install():
        raise SystemExit(f"error: cannot build {FREE}: {reason}")
    lengths = [int(length) for length in options.lengths.split(",")]
    tasks = [
        contest.Task(f"{len(prompt)} tokens", [prompt], 32, varies=True) for prompt in texts.prompts(lengths)
    ]
    common, *own = texts.prompts([1000, *[8] * options.sequences])
    prompts = [common + each for each in own]
    tasks.append(contest.Task(f"{options.sequences} sequences", prompts, 32, len(common)))
    return contest.run("invariance", tasks, speeds, options)


if __name__ == "__main__":
    sys.exit(main())
