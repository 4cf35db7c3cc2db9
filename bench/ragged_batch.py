"""How fast are prompts of very different lengths continued together, beside Transformers, in fp32?

8 prompts of 16 to 1,000 tokens, and one of them alone. Transformers pads them on the left to the longest; Plait, with
torch operations only (`plait-torch`) and as it is, packs them. End-to-end speed counts reading the prompts.

    python bench/ragged_batch.py
    python bench/ragged_batch.py --lengths 8,23,47,91,150,222,310,400 --rounds 1
    python bench/ragged_batch.py --lengths 150 --rounds 1
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import contest
import texts


def speeds(task: contest.Task, answer: dict[str, Any]) -> dict[str, float]:
    made = sum(map(len, answer["tokens"]))
    return {
        "end-to-end tokens/s": made / answer["seconds"],
        "decode tokens/s": len(task.prompts) / statistics.median(answer["steps"]),
    }


def main() -> int:
    parser = contest.parser(__doc__, "plait-torch,transformers,plait")
    parser.set_defaults(memory="full")
    parser.add_argument("--lengths", default="16,40,90,160,280,450,700,1000", help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    name = f"batch of {len(lengths)}"
    tasks = [contest.Task(name, texts.prompts(lengths), options.tokens)]
    return contest.run(f"ragged-{len(lengths)}-{max(lengths)}", tasks, speeds, options)


if __name__ == "__main__":
    sys.exit(main())
