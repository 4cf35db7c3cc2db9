"""What sequences share is read once for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, MeasurementError, Measurements, Quantity, Run

if TYPE_CHECKING:
    from torch import Tensor

    from plait.engine import LanguageModel
    from plait.memory import Memory, Past

__all__ = ["CLAIM", "attention_times"]


def _apart(pasts: Sequence[Past]) -> list[Past]:
    """The same pasts with a copy of everything for each, as without sharing."""
    twins = [past.fork() for past in pasts]
    for twin in twins:
        for memory in twin.memories("copied"):
            memory.strands = [strand.copied() for strand in memory.strands]
    return twins


def _bytes(pasts: Sequence[Past]) -> int:
    from plait.memory import allocated_bytes

    return allocated_bytes(
        [strand for past in pasts for memory in past.memories("counted") for strand in memory.held()]
    )


def attention_times(
    batch: int, prefix: int, suffix: int, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of one layer's attention of a step, 9 query and 3 key/value heads of size 64, in turns.

    Returns:
        Times of `shared` strands, of `apart` copies, and of torch's `sdpa` on a replicated cache; and the
        largest difference of their outputs.
    """
    import torch
    import torch.nn.functional as F

    from plait.memory import Heads, Memory, MemoryPlan, Rows, attend

    generator = torch.Generator().manual_seed(0)
    heads = Heads(9, 3, 64, scale=64**-0.5)

    def random(count: int, num_heads: int) -> Tensor:
        return torch.randn(count, num_heads, 64, generator=generator)

    def written(memory: Memory, count: int) -> None:
        memory.append(random(count, 3), random(count, 3))
        memory.commit()

    memory = Memory(heads, MemoryPlan())
    written(memory, prefix)
    shared = [memory.fork() for _ in range(batch)]
    for one in shared:
        written(one, suffix)
    apart = [one.fork() for one in shared]
    shared = [one.fork() for one in shared]
    for one in apart:
        one.strands = [strand.copied() for strand in one.strands]
    q, k, v = random(batch, 9), random(batch, 3), random(batch, 3)
    rows = Rows([(1, prefix + suffix)] * batch)
    pieces = [one.pieces(0, prefix + suffix) for one in shared]
    keys, values = (
        torch.stack(
            [
                torch.cat([*(getattr(strand, name) for strand in strands), new[:, None]], dim=1)
                for strands, new in zip(pieces, last, strict=True)
            ]
        )
        for name, last in (("keys", k), ("values", v))
    )

    def ours(memories: Sequence[Memory]) -> Tensor:
        out = attend(memories, q, k, v, rows)
        for one in memories:
            one.truncate(prefix + suffix)
        return out

    def sdpa(_: Sequence[Memory]) -> Tensor:
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
        return out[:, :, 0]

    ways = {"shared": (ours, shared), "apart": (ours, apart), "sdpa": (sdpa, shared)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    outs: dict[str, Tensor] = {}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for way, (work, memories) in list(ways.items())[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                outs[way] = work(memories)
                if number:
                    times[way].append(time.perf_counter() - start)
    difference = max(float((outs["shared"] - outs[way]).abs().max()) for way in ("apart", "sdpa"))
    return times, difference


def _generate(
    lm: LanguageModel, pasts: Sequence[Past], tokens: Sequence[Sequence[int]], new: int
) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds of all steps but the first, and the tokens of every sequence."""
    engine = lm.new_engine(max_sequences=len(pasts), rows_per_step=4096)
    running = [
        engine.submit(lm.request(ids, max_new_tokens=new, ignore_end=True), past)
        for ids, past in zip(tokens, pasts, strict=True)
    ]
    engine.step()
    start = time.perf_counter()
    for _ in engine.run():
        pass
    return time.perf_counter() - start, [sequence.result().tokens for sequence in running]


def _forks(
    lm: LanguageModel, prefix: Sequence[int], suffixes: Sequence[Sequence[int]]
) -> tuple[list[Past], list[list[int]]]:
    """Pasts that share the prefix, each ready to continue its own suffix."""
    past = lm.model.new_past(lm.plan)
    lm.new_engine().read(prefix, past)
    return [past.fork() for _ in suffixes], [[*prefix, *suffix] for suffix in suffixes]


def _measure(run: Run) -> Measurements:
    from plait.claims.texts import manual
    from plait.engine import load

    rounds = run.pick(7, 2)
    speedups: dict[str, list[float]] = {}
    differences = []
    batch, prefix = run.pick((32, 4096), (4, 256))
    yield f"attention of {batch} queries on {prefix} shared keys"
    times, difference = attention_times(batch, prefix, 64, rounds)
    differences.append(difference)
    if difference > 1e-4:
        raise MeasurementError(f"Outputs differ by {difference:.2g}, so no speed is reported.")
    for way in ("apart", "sdpa"):
        speedups[way] = [slow / fast for slow, fast in zip(times[way], times["shared"], strict=True)]

    yield "loading SmolLM2"
    lm = load("smollm2", weights="fp32")
    ids = lm.encode(manual())
    new = run.pick(32, 4)
    seconds: dict[tuple[int, str], list[float]] = {}
    shares: dict[int, float] = {}
    fp32, fp16 = lm, lm.with_memory("dense:dtype=fp16")
    # Copies of 8,064 tokens for 32 sequences take 12 GB in fp32; what is kept of the speed is measured in fp16.
    short, middle, long = run.pick((1024, 4096, 8064), (64, 96, 128))
    for length, lm in ((short, fp16), (middle, fp32), (long, fp16)):
        yield f"reading {length} tokens"
        suffixes = [[*ids[5000 + 7 * number : 5004 + 7 * number]] for number in range(batch)]
        pasts, tokens = _forks(lm, ids[:length], suffixes)
        copies = _apart(pasts)
        shares[length] = _bytes(copies) / _bytes(pasts)
        for number in range(run.pick(2, 1)):
            answers = {}
            for way, some in (("shared", pasts), ("apart", copies))[:: 1 if number % 2 else -1]:
                yield f"{length} tokens, {way}, round {number + 1}"
                twins = [past.fork() for past in some]
                spent, answers[way] = _generate(lm, twins, tokens, new)
                seconds.setdefault((length, way), []).append(spent)
            if answers["shared"] != answers["apart"]:
                raise MeasurementError(
                    "Answers with shared and with copied prefixes differ, so no speed is reported."
                )
        del copies, pasts, twins, some

    lm = fp32
    yield "a tree of two levels"
    problems, samples = run.pick((8, 8), (2, 2))
    few, statement = run.pick((2048, 300), (64, 40))
    root, _ = _forks(lm, ids[:few], [[]])
    one_level, two_levels, tokens = [], [], []
    for problem in range(problems):
        text = ids[few + problem * statement : few + (problem + 1) * statement]
        branch = root[0].fork()
        lm.new_engine().read([*ids[:few], *text], branch)
        two_levels += [branch.fork() for _ in range(samples)]
        for sample in range(samples):
            twin = branch.fork()
            for memory in twin.memories("copied"):
                memory.strands = [
                    strand if strand.position < few else strand.copied() for strand in memory.strands
                ]
            one_level.append(twin)
            tokens.append([*ids[:few], *text, ids[sample]])
    tree: dict[str, list[float]] = {"one": [], "two": []}
    for number in range(run.pick(2, 1)):
        for way, some in (("one", one_level), ("two", two_levels))[:: 1 if number % 2 else -1]:
            yield f"tree, {way} level, round {number + 1}"
            tree[way].append(_generate(lm, [past.fork() for past in some], tokens, new)[0])

    median = {key: statistics.median(values) for key, values in seconds.items()}
    kept = {way: median[short, way] / median[long, way] for way in ("shared", "apart")}
    return {
        "max_difference": Quantity.largest(differences, ""),
        "attention_speedup_over_sdpa": Quantity.median(speedups["sdpa"], "x"),
        "attention_speedup_over_copies": Quantity.median(speedups["apart"], "x"),
        "decode_speedup": Quantity(
            median[middle, "apart"] / median[middle, "shared"], "x", samples=len(seconds[middle, "shared"])
        ),
        "bytes_saved": Quantity(shares[middle], "x"),
        "speed_kept_shared": Quantity(kept["shared"], "x"),
        "speed_kept_copies": Quantity(kept["apart"], "x"),
        "speed_kept_ratio": Quantity(kept["shared"] / kept["apart"], "x"),
        "second_level_speedup": Quantity(
            statistics.median(tree["one"]) / statistics.median(tree["two"]), "x", samples=len(tree["two"])
        ),
        "decoded_tokens_per_second_shared": Quantity(
            batch * (new - 1) / median[middle, "shared"], "tokens/s"
        ),
    }


CLAIM = Claim(
    name="hydragen",
    title="A shared prefix is read once for all",
    headline=(
        "Attention to a shared prefix, computed once for all sequences, gives up to 32 times the throughput of engines that "
        "read it for each (CodeLlama-13B, 8 A100); a second level of sharing takes 55 % off the rest."
    ),
    source="Juravsky et al. 2024, Hydragen, arXiv:2402.05099",
    scale=(
        "Attention: one layer of SmolLM2's shape (9 query and 3 key/value heads of size 64), fp32, 32 sequences, 4,096 shared and "
        "64 own keys. Decoding: SmolLM2-135M-Instruct in fp32 with torch's operations, 32 sequences of 32 new tokens behind "
        "4,096 shared tokens, and with keys and values in fp16 behind 1,024 and 8,064, against the same engine with a copy for "
        "each; equal answers or no speed. Tree: 8 problems of 300 "
        "tokens with 8 samples each behind 2,048 tokens, against sharing only those."
    ),
    bars=(
        Bar(
            quantity="max_difference",
            relation="<=",
            value=1e-5,
            unit="",
            why="The parts merge exactly; only rounding may differ.",
        ),
        Bar(
            quantity="attention_speedup_over_sdpa",
            relation=">=",
            value=3.0,
            unit="x",
            why="One product of matrices instead of 32 products with vectors, on a processor that is soon bound by arithmetic.",
        ),
        Bar(
            quantity="decode_speedup",
            relation=">=",
            value=3.0,
            unit="x",
            why="At 4,096 tokens attention to the copies takes most of a step.",
        ),
        Bar(
            quantity="bytes_saved",
            relation=">=",
            value=15.0,
            unit="x",
            why="The prefix is stored once instead of 32 times.",
        ),
        Bar(
            quantity="speed_kept_ratio",
            relation=">=",
            value=2.0,
            unit="x",
            why="From 1,024 to 8,064 shared tokens a step with sharing must slow down far less.",
        ),
        Bar(
            quantity="second_level_speedup",
            relation=">=",
            value=1.3,
            unit="x",
            why="Samples of one problem share its statement too.",
        ),
    ),
    measure=_measure,
)
