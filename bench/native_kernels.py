"""How near are the native operations to the machine's limits, and to torch in fp32?

Checks each result against the reference first. Prints bytes and multiply-adds a second, medians of several runs.
Usage: python bench/native_kernels.py [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from plait.ops import Causal, native, reference
from plait.ops.native import PackedMatrix
from plait.weights.ggml import Q4_0, Q4_1, Q8_0

# SmolLM2-135M: the matrices of one block, and the output head.
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]
BATCHES = [1, 4, 16, 128, 512]


def seconds(work: Callable[..., Any], *arguments: Any, rounds: int = 9, **options: Any) -> float:
    """Median time of one call; each round lasts at least 20 ms."""
    work(*arguments, **options)
    start = time.perf_counter()
    work(*arguments, **options)
    count = max(1, int(0.02 / max(1e-7, time.perf_counter() - start)))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            work(*arguments, **options)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def memory_bandwidth() -> float:
    """Bytes a second that all threads read from memory."""
    big = torch.ones(1 << 27)
    return big.nbytes / seconds(big.sum, rounds=5)


def products() -> list[dict[str, Any]]:
    rows = []
    for outputs, columns in SHAPES:
        weight = torch.randn(outputs, columns)
        for form in (Q4_0(), Q4_1(), Q8_0()):
            blocks = form.pack(weight)
            matrix = PackedMatrix(blocks.blocks, form.name)
            for batch in BATCHES:
                x = torch.randn(batch, columns)
                wanted = x @ blocks.unpack().T
                error = float((matrix.matmul(x) - wanted).norm() / wanted.norm())
                assert error < 0.02, f"{form.name} {outputs}x{columns}: off by {error}"
                mine, theirs = seconds(matrix.matmul, x), seconds(reference.linear, x, weight)
                rows.append({
                    "op": f"{form.name} {outputs}x{columns}", "batch": batch, "us": mine * 1e6,
                    "GB/s": matrix.nbytes() / mine / 1e9, "GMAC/s": batch * outputs * columns / mine / 1e9,
                    "torch fp32 us": theirs * 1e6, "ratio": theirs / mine,
                })  # fmt: skip
    return rows


def attention() -> list[dict[str, Any]]:
    rows = []
    for queries, keys in [(1, 128), (1, 441), (1, 4000), (8, 4000), (441, 441), (512, 4000)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k, v = (
                torch.randn(queries, 9, 64),
                torch.randn(3, keys, 64).to(dtype),
                torch.randn(3, keys, 64).to(dtype),
            )
            options: dict[str, Any] = {"scale": 0.125, "mask": Causal(), "first_query": keys - queries}
            wanted = reference.partial_attention(q, k, v, **options).out
            torch.testing.assert_close(
                native.partial_attention(q, k, v, **options).out, wanted, atol=1e-5, rtol=1e-5
            )
            mine = seconds(native.partial_attention, q, k, v, **options)
            theirs = seconds(reference.partial_attention, q, k, v, rounds=3, **options)
            rows.append({
                "op": f"attention {keys} keys {str(dtype).removeprefix('torch.')}", "batch": queries, "us": mine * 1e6,
                "GB/s": 2 * k.nbytes / mine / 1e9, "GMAC/s": 2 * 9 * 64 * queries * (keys - queries / 2) / mine / 1e9,
                "torch fp32 us": theirs * 1e6, "ratio": theirs / mine,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    choices = parser.parse_args()
    extension = native.module()
    if extension is None:
        raise SystemExit("The native operations are not available here.")
    if choices.threads:
        extension.set_threads(choices.threads)
    torch.set_num_threads(extension.threads())
    report = {
        "isa": extension.isa(), "threads": extension.threads(), "torch": torch.__version__,
        "memory GB/s": memory_bandwidth() / 1e9, "rows": products() + attention(),
    }  # fmt: skip
    if choices.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{report['isa']}, {report['threads']} threads, memory {report['memory GB/s']:.1f} GB/s")
    for row in report["rows"]:
        print(
            f"{row['op']:<28} {row['batch']:>4} rows {row['us']:>10.1f} us {row['GB/s']:>7.1f} GB/s"
            f" {row['GMAC/s']:>7.1f} GMAC/s  torch fp32 {row['torch fp32 us']:>10.1f} us  {row['ratio']:>5.2f}x"
        )


if __name__ == "__main__":
    main()
