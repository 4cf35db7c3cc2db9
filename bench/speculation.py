"""How fast is one sequence decoded when everybody speculates, task by task?

The peers' own speculation beside Plait's drafts, and all of them beside plain decoding: prompt look-up and draft models
of llama.cpp, OpenVINO GenAI and Transformers. Greedy, the same GGUF, threads and token ids on all sides (Transformers:
the same weights dequantised), the same draft model, one prompt after the other. Each task has a file of results of its
own, so that a contest can be run task by task, and a few sides at a time. Needs `python bench/peers.py install`; sides
with a draft model need one, made by `plait train draft --out DIR`.

    python bench/speculation.py --draft-model DIR
    python bench/speculation.py --tasks editing --prompts 1 --tokens 32 --rounds 1 --sides plait,llama.cpp+lookup
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import contest
import peers

# Plait's drafts, the best combination first: it is the one that ratios are of.
DRAFTS = ("mix:prompt-lookup+token-recycling", "prompt-lookup", "token-recycling")
WITH_MODEL = ("mix:prompt-lookup+token-recycling+chain:tokens=8", "chain:tokens=8", "pearl")


def speeds(task: contest.Task, answer: dict[str, Any]) -> dict[str, float]:
    after = sum(map(len, answer["tokens"])) - answer["begun"]
    return {
        "decode tokens/s": after / (answer["seconds"] - answer["first"]),
        "tokens/step": after / len(answer["steps"]),
    }


def sides_of(options: Any) -> list[str]:
    """Who takes part; a draft of Plait may have commas of its own, so that they are given one by one."""
    sides = options.sides.split(",")
    drafts = options.plait or [*(WITH_MODEL if options.draft_model else ()), *DRAFTS]
    sides = [f"plait+{draft}" for draft in drafts] + sides
    needing = [side for side in sides if side.endswith("+draft")]
    if needing and not options.draft_model:
        print(f"{', '.join(needing)} take no part: give --draft-model", file=sys.stderr)
        return [side for side in sides if side not in needing]
    return sides


def main() -> int:
    from plait.claims.tasks import TASKS
    from plait.engine import load

    everybody = [
        f"{name}{how}"
        for name in ("llama.cpp", "openvino", "transformers")
        for how in ("", *(f"+{one}" for one in peers.PEERS[name].speculations))
    ]
    parser = contest.parser(__doc__, ",".join(["plait", *everybody]))
    parser.add_argument(
        "--plait", action="append", help="a draft of Plait; give the option again for another"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks, by commas")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each task, at most")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of every prompt")
    parser.add_argument(
        "--draft-model", type=Path, help="folder of the draft model that all sides guess with"
    )
    options = parser.parse_args()
    if unknown := set(options.tasks.split(",")) - set(TASKS):
        parser.error(f"unknown tasks {', '.join(sorted(unknown))}; known: {', '.join(TASKS)}")
    lm = load(peers.gguf())
    sides, more = sides_of(options), {}
    if options.draft_model:
        more = {
            "draft_model": peers.draft_gguf(options.draft_model),
            "draft_folder": str(options.draft_model),
        }
    code = 0
    for name in options.tasks.split(","):
        task = contest.Task(name, TASKS[name](lm)[: options.prompts], options.tokens, apart=True)
        code |= contest.run(f"speculation-{name}", [task], speeds, options, who=sides, more=more)
    return code


if __name__ == "__main__":
    sys.exit(main())
