"""Does a stream of a million tokens run in flat memory and flat time a token?

One layer of SmolLM2's shape (9 query and 3 key/value heads of size 64) reads random keys, values and queries in pieces of
256 tokens, each of which is attended to; neither bytes nor time depend on the numbers. Each memory streams in a process of
its own. Per stretch: seconds a token, bytes that the memory counts, and growth of the process' resident memory.

    python bench/long_stream.py
    python bench/long_stream.py --tokens 100000 --picture build/bench/long_stream.svg
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from contest import RESULTS
from plait.claims.machine import Machine
from plait.evaluation.picture import check_picture, save_picture
from plait.files import write_text
from plait.memory import Heads, Memory, MemoryPlan, Rows, attend

MEMORIES = (
    "lm-infinite:local=1024,initial=10",
    "infllm:local=512,initial=64,block=64,topk=8,execution=256,cold=file",
    "infllm:local=512,initial=64,block=64,topk=8,execution=256,cold=file,gear:bits=4",
)
PIECE = 256


def stream(memory: str, tokens: int, stretches: int) -> Iterator[dict[str, Any]]:
    """Read tokens, and tell what each stretch cost."""
    heads = Heads(9, 3, 64, scale=64**-0.5)
    random = torch.Generator().manual_seed(0)

    def read(layer: Memory) -> None:
        q, k, v = (torch.randn(PIECE, n, 64, generator=random) for n in (9, 3, 3))
        attend([layer], q, k, v, Rows([(PIECE, len(layer))]))
        layer.commit(is_prompt=True)

    def resident() -> int:
        # Pages of a file are given back whenever somebody else needs the room.
        held = psutil.Process().memory_info()
        return int(held.rss - held.shared)

    with torch.inference_mode():
        # What libraries allocate once, whatever is held, is no part of the curve.
        warm = Memory(heads, MemoryPlan.parse(memory))
        while len(warm) < 4096:
            read(warm)
        del warm
        layer = Memory(heads, MemoryPlan.parse(memory))
        start, mark = resident(), 0
        began = time.perf_counter()
        while mark < tokens:
            read(layer)
            done = len(layer)
            if done - mark >= tokens / stretches or done >= tokens:
                now = time.perf_counter()
                yield {
                    "tokens": done,
                    "microseconds_per_token": (now - began) / (done - mark) * 1e6,
                    "counted": layer.nbytes(),
                    "resident": resident() - start,
                }
                mark, began = done, time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--stretches", type=int, default=20)
    parser.add_argument("--memory", action="append", help="a spec string; can be repeated")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.only:
        for row in stream(options.only, options.tokens, options.stretches):
            print(json.dumps(row), flush=True)
        return 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.picture:
        check_picture(options.picture)
    curves: dict[str, list[dict[str, Any]]] = {}
    for memory in options.memory or MEMORIES:
        print(f"{memory} ...", file=sys.stderr)
        command = [sys.executable, __file__, "--only", memory, "--tokens", str(options.tokens)]
        command += ["--stretches", str(options.stretches)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
        curves[memory] = [json.loads(line) for line in done.stdout.splitlines()]
    result = {"machine": str(Machine.this()), "tokens": options.tokens, "curves": curves}
    write_text(RESULTS / "long_stream.json", json.dumps(result, indent=1) + "\n")
    if options.picture:
        picture(curves, options.picture)
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    for memory, rows in curves.items():
        print(memory)
        for row in (rows[0], rows[len(rows) // 2], rows[-1]):
            print(
                f"  {row['tokens']:>9,} tokens {row['microseconds_per_token']:8.1f} us/token"
                f" {row['counted'] / 1e6:8.2f} MB counted {row['resident'] / 1e6:8.2f} MB more resident"
            )
    return 0


def picture(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time and memory against the tokens that were read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    speed, size = figure.subplots(1, 2)
    for memory, rows in curves.items():
        tokens = [row["tokens"] / 1e6 for row in rows]
        speed.plot(tokens, [row["microseconds_per_token"] for row in rows], label=memory)
        (line,) = size.plot(tokens, [row["counted"] / 1e6 for row in rows])
        size.plot(tokens, [row["resident"] / 1e6 for row in rows], ":", color=line.get_color())
    for axis, label in ((speed, "microseconds a token"), (size, "MB: counted, resident (dotted)")):
        axis.set_xlabel("million tokens read")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    figure.suptitle("One layer reads a million tokens", fontsize=10)
    figure.legend(loc="outside lower center", fontsize=7)
    save_picture(figure, path)


if __name__ == "__main__":
    sys.exit(main())
