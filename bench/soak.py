"""Does a request's answer depend on its neighbours, on memory, or on how long the engine has run?

Requests of random lengths come in waves; some are cancelled, many begin alike, and the budget is so small that pasts
are given back and read again. Every answer is then compared, bit for bit (tokens, log-probabilities, alternatives),
with that of the same request alone, and resident memory is read along the way.

    python bench/soak.py
    python bench/soak.py --requests 100 --model smollm2 --json
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

import plait
from plait.claims.texts import token_runs
from plait.decode import Sampling
from plait.engine import Generation, LanguageModel, Request, RunningSequence


def random_request(lm: LanguageModel, chance: random.Random, beginnings: list[list[int]]) -> Request:
    """A request that often has a beginning in common with others; half of them are sampled."""
    prompt = chance.choice(beginnings)[: chance.choice([0, 32, 50, 96])]
    prompt = prompt + [chance.randrange(100, 5000) for _ in range(chance.randrange(1, 60))]
    sampling = Sampling(temperature=chance.choice([0.0, 0.9]), seed=chance.randrange(1000), logprobs=2)
    return Request(
        prompt=prompt, max_new_tokens=chance.randrange(1, 16), sampling=sampling, ignore_end=True,
        tenant=chance.choice(["anna", "bert", "carl"]),
    )  # fmt: skip


def alone(lm: LanguageModel, request: Request) -> Generation:
    """The answer of an engine that has nothing else to do and shares nothing."""
    engine = lm.new_engine(share_prefixes=False)
    sequence = engine.submit(request)
    for _ in engine.run():
        pass
    return sequence.result()


def resident_bytes() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def soak(lm: LanguageModel, count: int, tokens: int, seed: int) -> dict[str, Any]:
    """Run `count` requests in an engine with room for about `tokens` tokens, and check each answer."""
    chance = random.Random(seed)
    beginnings = token_runs(lm.tokenizer, [96, 96, 96])
    past = lm.model.new_past(lm.plan)
    engine = lm.new_engine(rows_per_step=48, max_sequences=12, memory_bytes=past.growth(tokens))
    given: list[tuple[RunningSequence, bool]] = []
    resident: list[int] = []
    while len(given) < count or not engine.is_idle:
        if len(given) < count and engine.metrics.running + engine.metrics.waiting < 30:
            for _ in range(min(chance.randrange(10), count - len(given))):
                given.append((engine.submit(random_request(lm, chance, beginnings)), chance.random() < 0.2))
                if len(given) % max(1, count // 20) == 0:
                    resident.append(resident_bytes())
        engine.step()
        unfinished = [one for one, is_doomed in given[-30:] if is_doomed and not one.is_finished]
        if unfinished and chance.random() < 0.3:
            engine.cancel(chance.choice(unfinished))
    engine.check_integrity()
    metrics = engine.metrics
    different = cancelled = 0
    for sequence, _ in given:
        answer = sequence.result()
        wanted = alone(lm, sequence.request).choices
        if answer.finish_reason == "cancelled":
            cancelled += 1
            wanted = wanted[: len(answer.tokens)]
        different += answer.choices != wanted
    half = resident[len(resident) // 2 :]
    return {
        "requests": count, "different": different, "cancelled": cancelled, "preemptions": metrics.preemptions,
        "prefix_hits": metrics.hits, "resident_mb": [round(value / 1e6, 1) for value in resident],
        "grown_over_last_half_mb": round((half[-1] - half[0]) / 1e6, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--memory", default="full")
    parser.add_argument("--tokens", type=int, default=400, help="tokens that the memory budget has room for")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    lm = plait.load(options.model, memory=options.memory)
    found = soak(lm, options.requests, options.tokens, options.seed)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(
            f"{found['requests']} requests, {found['cancelled']} cancelled, {found['preemptions']} preemptions, "
            f"{found['prefix_hits']} shared beginnings: {found['different']} answers differ from those alone"
        )
        print(
            f"resident MB along the way: {found['resident_mb']}; last half {found['grown_over_last_half_mb']:+}"
        )
    return 1 if found["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
