"""From how many sequences, and from what length, does reading a shared prefix once pay?

One layer's attention of a decoding step, with one shared strand, with a copy for each sequence, and with
torch's scaled_dot_product_attention on a replicated cache. They take turns; numbers are medians over rounds,
and no speed is printed where outputs differ.

    python bench/shared_prefix_decode.py
    python bench/shared_prefix_decode.py --batches 2,8 --prefixes 16,1024 --rounds 5 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import torch

from plait.claims.cards.hydragen import attention_times
from plait.claims.machine import memory_bandwidth

# Keys and values of a token: 3 heads of 64 numbers in fp32, twice.
BYTES_OF_A_TOKEN = 2 * 3 * 64 * 4


def measured(batch: int, prefix: int, suffix: int, rounds: int) -> dict[str, float]:
    """One line of the table."""
    times, difference = attention_times(batch, prefix, suffix, rounds)
    if difference > 1e-4:
        raise SystemExit(
            f"batch {batch}, prefix {prefix}: outputs differ by {difference:.2g}; no speed is reported"
        )
    seconds = {way: statistics.median(values) for way, values in times.items()}
    read = (prefix + batch * suffix) * BYTES_OF_A_TOKEN
    return {
        "batch": batch,
        "prefix": prefix,
        "shared_us": seconds["shared"] * 1e6,
        "apart_us": seconds["apart"] * 1e6,
        "sdpa_us": seconds["sdpa"] * 1e6,
        "over_apart": seconds["apart"] / seconds["shared"],
        "over_sdpa": seconds["sdpa"] / seconds["shared"],
        "shared_gb_per_s": read / seconds["shared"] / 1e9,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", default="2,4,8,32", help="numbers of sequences")
    parser.add_argument("--prefixes", default="1,16,64,256,1024,4096", help="lengths of the shared prefix")
    parser.add_argument("--suffix", type=int, default=64, help="tokens of each sequence's own")
    parser.add_argument("--rounds", type=int, default=9, help="rounds after the warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        measured(int(batch), int(prefix), options.suffix, options.rounds)
        for batch in options.batches.split(",")
        for prefix in options.prefixes.split(",")
    ]
    limit = memory_bandwidth() / 1e9
    if options.json:
        print(json.dumps({"threads": options.threads, "memory_gb_per_s": limit, "rows": rows}, indent=2))
        return 0
    print(f"torch {torch.__version__}, {options.threads} threads, memory reads {limit:.1f} GB/s")
    print("batch prefix  shared us   apart us    sdpa us  over apart  over sdpa   GB/s")
    for row in rows:
        print(
            f"{row['batch']:5.0f} {row['prefix']:6.0f} {row['shared_us']:10.0f} {row['apart_us']:10.0f} "
            f"{row['sdpa_us']:10.0f} {row['over_apart']:10.2f}x {row['over_sdpa']:9.2f}x {row['shared_gb_per_s']:6.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
