"""How fast does Plait decode beside Hugging Face Transformers?

Both sides hold the same SmolLM2 weights in fp32, use the same number of threads, read the same prompts and
must give the same greedy text, else no speed is printed. They take turns; numbers are medians over rounds.

    python bench/decode_vs_transformers.py
    python bench/decode_vs_transformers.py --lengths 16,64,256 --rounds 3 --json
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from plait.claims.cards.decode_speed import races
from plait.claims.contest import decode_contest
from plait.claims.report import Report, report
from plait.errors import PlaitError


def shares_of_bandwidth(result: Report) -> dict[str, float]:
    """For each side and race, how much of the memory's measured speed goes into reading weights."""
    limit = result.quantities["memory_bandwidth"].value
    return {
        name.replace("_weights_read_", "_"): quantity.value / limit
        for name, quantity in result.quantities.items()
        if "_weights_read_" in name
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="8,23,47,91,150,222,310,400", help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer, at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each side")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.tokens < 2 or options.rounds < 1 or options.threads < 1:
        parser.error("--tokens must be at least 2, --rounds and --threads at least 1")
    torch.set_num_threads(options.threads)
    lengths = tuple(int(length) for length in options.lengths.split(","))
    try:
        entries = races(lengths, options.tokens)
        result = report(decode_contest(entries, rounds=options.rounds, threads=options.threads))
    except PlaitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shares = shares_of_bandwidth(result)
    if options.json:
        print(json.dumps({**result.to_json(), "share_of_bandwidth": shares}, indent=2))
    else:
        print(result)
        for name, share in shares.items():
            print(f"{name.replace('_', ' ')} reads its weights at {share:.0%} of the memory's speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
