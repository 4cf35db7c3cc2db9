"""How near is each side to what this machine can do? A table from the results of `decode.py` and `prefill.py`.

Measures the machine first: bytes a second that torch's threads read and copy, and fp32 multiplications. For every
result: bytes that a token must read at least (weights of the file, and keys and values in 16 bits), its arithmetic,
and the share of the measured limit that the speed amounts to. A side that reads the dequantised weights moves more
bytes than that; the share is of the work that the file asks for, so that sides compare.

    python bench/roofline.py
    python bench/roofline.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import contest
import peers

# SmolLM2-135M: layers, key/value heads and head size; weights in the layers, and in the head.
LAYERS, KV_NUMBERS, QUERY_NUMBERS = 30, 2 * 3 * 64, 2 * 9 * 64
LAYER_WEIGHTS, HEAD_WEIGHTS = 106_168_320, 28_311_552


def best(work: Callable[[], Any], rounds: int = 5) -> float:
    """Least seconds of some calls."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def machine(threads: int) -> dict[str, float]:
    """The machine's limits as torch reaches them."""
    torch.set_num_threads(threads)
    block = torch.ones(1 << 27)
    copy = torch.empty_like(block)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return {
        "read GB/s": block.nbytes / best(block.sum) / 1e9,
        "copy GB/s": 2 * block.nbytes / best(lambda: copy.copy_(block)) / 1e9,
        "fp32 GFLOP/s": 2 * 2048**3 / best(lambda: a @ b) / 1e9,
    }


def rows(limits: dict[str, float], weight_bytes: int) -> list[dict[str, Any]]:
    """One row for every side and length that was measured."""
    found = []
    for path in sorted(contest.RESULTS.glob("*.json")):
        for key, values in json.loads(path.read_text()).get("samples", {}).items():
            task, quantity, side = key.split("|")
            kind = quantity.split()[0]
            if kind not in ("decode", "prefill") or not task.endswith(" tokens"):
                continue
            length, speed = int(task.split()[0]), statistics.median(values)
            attention = 2 * LAYERS * QUERY_NUMBERS * (length if kind == "decode" else length / 2)
            read = weight_bytes + 2 * LAYERS * KV_NUMBERS * length
            head = HEAD_WEIGHTS if kind == "decode" else HEAD_WEIGHTS / length
            work = 2 * (LAYER_WEIGHTS + head) + attention
            memory, arithmetic = read * speed / 1e9, work * speed / 1e9
            found.append({
                "task": f"{kind} {task}", "side": side, "tokens/s": speed,
                "MB a token": (read if kind == "decode" else read / length) / 1e6, "MFLOP a token": work / 1e6,
                "of read limit": (memory if kind == "decode" else memory / length) / limits["read GB/s"],
                "of fp32 limit": arithmetic / limits["fp32 GFLOP/s"],
            })  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    limits = machine(options.threads)
    table = rows(limits, Path(peers.gguf()).stat().st_size)
    if options.json:
        print(json.dumps({"limits": limits, "rows": table}, indent=1))
        return 0
    print(", ".join(f"{name} {value:.1f}" for name, value in limits.items()))
    for row in table:
        print(
            f"{row['task']:24}{row['side']:14}{row['tokens/s']:9.1f} tokens/s {row['MB a token']:8.2f} MB a token "
            f"{row['MFLOP a token']:8.1f} MFLOP a token  {row['of read limit']:6.1%} of reading, "
            f"{row['of fp32 limit']:6.1%} of fp32 arithmetic"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
