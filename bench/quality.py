"""How often does each side answer with the very tokens of the same weights in fp32?

Greedy answers to 50 prompts of chat, code, copying and Python's manual, by Plait and by llama.cpp from the same file,
against Plait's own in fp32. Nothing is timed. Needs `python bench/peers.py install llama.cpp`.

    python bench/quality.py
    python bench/quality.py --tokens 20 --prompts 10 --json
"""

from __future__ import annotations

import argparse
import json
import sys

import contest


def main() -> int:
    import plait
    from plait.claims.cards.native_quality import quality_prompts
    from plait.claims.greedy import by_plait

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="plait,llama.cpp", help="who takes part, by commas")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens")
    parser.add_argument("--prompts", type=int, default=50, help="prompts, at most 50")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    exact = plait.load("smollm2", weights="fp32")
    prompts = quality_prompts(exact)[: options.prompts]
    wanted = [answer for start in range(0, len(prompts), 10)
              for answer in by_plait(exact, prompts[start : start + 10], options.tokens)]  # fmt: skip
    tasks = [contest.Task(str(i), [prompt], options.tokens) for i, prompt in enumerate(prompts)]
    contest.RESULTS.mkdir(parents=True, exist_ok=True)
    choice = {"memory": "dense:dtype=fp16", "weights": "auto", "draft": "none"}
    shares: dict[str, float] = {}
    for name in contest.present(options.sides.split(",")):
        with contest.Side(name, tasks, options.threads, choice) as side:
            answers = [side.ask(task.message())["tokens"][0] for task in tasks]
        shares[side.version] = sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted)
    if options.json:
        print(json.dumps({"prompts": len(prompts), "tokens": options.tokens, "identical": shares}))
    else:
        for version, share in shares.items():
            print(f"{version:40} {share:6.0%} of {len(prompts)} answers of {options.tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
