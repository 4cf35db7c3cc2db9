"""How fast does Plait read and decode beside llama.cpp, on the same GGUF, threads and token ids?

Each side is a process of its own; they take turns, and numbers are medians over rounds. `--peer` names a Python
that has llama-cpp-python; `make bench` makes one.

    python bench/decode_vs_llama_cpp.py --peer bench/environments/llama-cpp/bin/python
    python bench/decode_vs_llama_cpp.py --lengths 20,441 --rounds 3 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def plait_side(model: str, memory: str) -> None:
    """Plait's side, with the protocol of `peer_llama_cpp.py`."""
    import plait

    lm = plait.load(model, memory=memory)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        engine = lm.new_engine()
        start = time.perf_counter()
        sequence = engine.submit(lm.request(task["prompt"], max_new_tokens=task["tokens"], ignore_end=True))
        while not sequence.choices:
            engine.step()
        prefill = time.perf_counter() - start
        steps = []
        while not engine.is_idle:
            start = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - start)
        tokens = [choice.token for choice in sequence.choices]
        print(json.dumps({"tokens": tokens, "prefill": prefill, "steps": steps}), flush=True)


class Side:
    """A process that answers tasks."""

    def __init__(self, command: list[str], threads: int) -> None:
        import os

        environment = {**os.environ, "PLAIT_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.answer()

    def ask(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Seconds and tokens of one greedy continuation."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a side ended with exit code {self.process.wait()}; see above")
        found: dict[str, Any] = json.loads(line)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default=str(HERE / "environments/llama-cpp/bin/python"))
    parser.add_argument("--lengths", default="20,441,4000", help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--memory", default="dense:dtype=fp16", help="Plait's memory; llama.cpp keeps 16 bits too"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=["plait"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        plait_side("smollm2", options.memory)
        return 0
    if not Path(options.peer).exists():
        print(f"error: {options.peer} is not there; run `make bench` or give --peer", file=sys.stderr)
        return 1
    import plait
    from plait.claims.texts import token_runs

    path = str(plait.pull("smollm2"))
    lengths = [int(length) for length in options.lengths.split(",")]
    prompts = token_runs(plait.load("smollm2").tokenizer, lengths)
    context = max(lengths) + options.tokens + 8
    sides = {
        "plait": Side([sys.executable, __file__, "--side", "plait", "--memory", options.memory], options.threads),
        "llama.cpp": Side(
            [options.peer, str(HERE / "peer_llama_cpp.py"), path, str(options.threads), str(context)],
            options.threads,
        ),
    }  # fmt: skip
    speeds: dict[str, list[float]] = {}
    same: dict[int, int] = {}
    for number in range(options.rounds + 1):
        for length, prompt in zip(lengths, prompts, strict=True):
            answers = {
                name: side.ask(prompt, options.tokens)
                for name, side in list(sides.items())[:: 1 if number % 2 else -1]
            }
            pairs = zip(answers["plait"]["tokens"], answers["llama.cpp"]["tokens"], strict=True)
            same[length] = next((i for i, (a, b) in enumerate(pairs) if a != b), options.tokens)
            if number == 0:
                continue
            for kind in ("prefill", "decode"):
                found = {
                    name: length / answer["prefill"]
                    if kind == "prefill"
                    else 1 / statistics.median(answer["steps"])
                    for name, answer in answers.items()
                }
                for name, speed in found.items():
                    speeds.setdefault(f"{kind} {length} {name}", []).append(speed)
                speeds.setdefault(f"{kind} {length} ratio", []).append(found["plait"] / found["llama.cpp"])
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    if options.json:
        print(json.dumps({"medians": medians, "samples": speeds, "equal_tokens": same}, indent=2))
        return 0
    print("          prompt   plait tok/s   llama.cpp tok/s   ratio")
    for kind in ("prefill", "decode"):
        for length in lengths:
            row = [medians[f"{kind} {length} {name}"] for name in ("plait", "llama.cpp", "ratio")]
            print(f"{kind:9} {length:6}   {row[0]:11.1f}   {row[1]:15.1f}   {row[2]:5.2f}")
    print(f"equal greedy tokens from the start, of {options.tokens}: {same}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
