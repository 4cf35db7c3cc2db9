"""How fast are many sequences with a long common beginning answered, from start to end?

16 questions behind one text of 1,000 tokens, 64 new tokens each. Every side shares the beginning in its own way:
Plait finds it by itself, vLLM and OpenVINO by their prefix caches (empty at the start), llama.cpp by a copy, and
Transformers by a cache that is read once and repeated for all.

    python bench/shared_prefix.py
    python bench/shared_prefix.py --prefix 4096 --sequences 32 --tokens 32 --sides plait,llama.cpp,transformers
    python bench/shared_prefix.py --rounds 1 --sides plait,vllm
"""

from __future__ import annotations

import sys
from typing import Any

import contest
import texts


def speeds(task: contest.Task, answer: dict[str, Any]) -> dict[str, float]:
    made = sum(map(len, answer["tokens"]))
    decoded = len(answer["steps"]) * len(task.prompts)
    return {
        "end-to-end tokens/s": made / answer["seconds"],
        "decode tokens/s": decoded / sum(answer["steps"]),
        "peak MB": answer["peak"] / 1e6,
    }


def main() -> int:
    parser = contest.parser(__doc__, "plait,llama.cpp,openvino,vllm,transformers")
    parser.add_argument("--prefix", type=int, default=1000, help="tokens of the common beginning")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each")
    options = parser.parse_args()
    common, *own = texts.prompts([options.prefix, *[8] * options.sequences])
    prompts = [common + each for each in own]
    tasks = [contest.Task(f"{options.sequences} sequences", prompts, options.tokens, options.prefix)]
    return contest.run("shared-prefix", tasks, speeds, options)


if __name__ == "__main__":
    sys.exit(main())
