"""How fast is a prompt read, until its first token? Its own first token is another one in every round.

python bench/prefill.py
python bench/prefill.py --lengths 441 --rounds 1 --sides plait,openvino
"""

from __future__ import annotations

import sys
from typing import Any

import contest
import texts


def speeds(task: contest.Task, answer: dict[str, Any]) -> dict[str, float]:
    return {"prefill tokens/s": len(task.prompts[0]) / answer["first"]}


def main() -> int:
    parser = contest.parser(__doc__, "plait,llama.cpp,openvino,transformers")
    parser.add_argument("--lengths", default="441,4000", help="tokens of the prompts")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    tasks = [
        contest.Task(f"{len(prompt)} tokens", [prompt], 1, varies=True) for prompt in texts.prompts(lengths)
    ]
    return contest.run(f"prefill-{options.lengths}", tasks, speeds, options)


if __name__ == "__main__":
    sys.exit(main())
