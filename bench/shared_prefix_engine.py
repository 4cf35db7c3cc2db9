"""How much faster does the engine decode many sequences with one prefix than the same engine without sharing?

The prefix is read once. Then every sequence continues it, with the strands that all have in common and, afterwards, with
a copy for each; steps are timed when all are decoding. No speed is printed where tokens differ.

    python bench/shared_prefix_engine.py
    python bench/shared_prefix_engine.py --sequences 16 --prefix 1000 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import plait
from plait.claims.texts import token_runs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--memory", default="dense:dtype=fp16")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=4000, help="tokens that all prompts begin with")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each sequence")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    lm = plait.load(options.model, memory=options.memory)
    prefix = token_runs(lm.tokenizer, [options.prefix])[0]
    steps: dict[bool, list[float]] = {}
    answers: dict[bool, list[tuple[int, ...]]] = {}
    source = lm.model.new_past(lm.plan)
    reader = lm.new_engine()
    reader.read(prefix, source)
    for shares in (True, False):
        engine = lm.new_engine(share_prefixes=False, max_sequences=options.sequences)
        sequences = []
        for number in range(options.sequences):
            past = source.fork()
            if not shares:
                for layer in past.memories("copied"):
                    layer.strands = [strand.copied() for strand in layer.strands]
            request = lm.request([*prefix, 300 + number, 40], max_new_tokens=options.tokens, ignore_end=True)
            sequences.append(engine.submit(request, past))
        while any(not sequence.choices for sequence in sequences):
            engine.step()
        while not engine.is_idle:
            start = time.perf_counter()
            engine.step()
            steps.setdefault(shares, []).append(time.perf_counter() - start)
        answers[shares] = [sequence.result().tokens for sequence in sequences]
        del engine, sequences
    if answers[True] != answers[False]:
        print("error: tokens differ; no speed is reported", file=sys.stderr)
        return 1
    shared, apart = (statistics.median(steps[shares]) for shares in (True, False))
    found = {
        "sequences": options.sequences,
        "prefix": options.prefix,
        "shared_tokens_per_s": options.sequences / shared,
        "apart_tokens_per_s": options.sequences / apart,
        "ratio": apart / shared,
    }
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(
            f"{options.sequences} sequences, prefix of {options.prefix}: {found['shared_tokens_per_s']:.0f} tokens/s "
            f"shared, {found['apart_tokens_per_s']:.0f} apart, ratio {found['ratio']:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
