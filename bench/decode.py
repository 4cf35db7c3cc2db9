"""How fast is one sequence decoded, at a short and at a long context?

Greedy, no speculation, the same GGUF, threads and token ids on all sides (Transformers and vLLM: the same weights
dequantised). Needs `python bench/peers.py install`.

    python bench/decode.py
    python bench/decode.py --lengths 4000 --rounds 1 --sides plait,llama.cpp
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import contest
import texts


def speeds(task: contest.Task, answer: dict[str, Any]) -> dict[str, float]:
    return {"decode tokens/s": 1 / statistics.median(answer["steps"])}


def main() -> int:
    parser = contest.parser(__doc__, "plait,llama.cpp,openvino,transformers")
    parser.add_argument("--lengths", default="20,441,4000", help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    tasks = [
        contest.Task(f"{len(prompt)} tokens", [prompt], options.tokens) for prompt in texts.prompts(lengths)
    ]
    return contest.run(f"decode-{options.lengths}", tasks, speeds, options)


if __name__ == "__main__":
    sys.exit(main())
