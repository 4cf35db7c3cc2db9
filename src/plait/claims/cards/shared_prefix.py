"""A common beginning is stored once and visited once for all sequences that have it.

Shapes: B sequences, P tokens of the beginning, S tokens of each sequence's own, H query heads, G key/value
heads, D head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, MeasurementError, Measurements, Quantity, Run

if TYPE_CHECKING:
    from plait.engine import Engine, LanguageModel
    from plait.memory import Past

__all__ = ["CLAIM"]


def _attention(run: Run) -> Measurements:
    """One layer's attention of one decode step, beside torch's own on a cache with the beginning repeated."""
    import torch

    from plait.memory import Heads, Memory, MemoryPlan, Rows
    from plait.memory.memory import attend

    B, P, S = run.pick((32, 4096, 64), (4, 128, 8))
    H, G, D = 9, 3, 64
    random = torch.Generator().manual_seed(run.seed)
    heads, plan = Heads(num_heads=H, num_kv_heads=G, head_dim=D, scale=D**-0.5), MemoryPlan()
    first = Memory(heads, plan)
    first.append(*torch.randn(2, P, G, D, generator=random))
    memories = [first, *(first.fork() for _ in range(B - 1))]
    for memory in memories:
        memory.append(*torch.randn(2, S - 1, G, D, generator=random))
        memory.commit()
    q_BHD = torch.randn(B, H, D, generator=random)
    k_BGD, v_BGD = torch.randn(2, B, G, D, generator=random)
    rows = Rows([(1, P + S - 1)] * B)

    def shared() -> torch.Tensor:
        out = attend(memories, q_BHD, k_BGD, v_BGD, rows)
        for memory in memories:
            memory.truncate(P + S - 1)
        return out

    keys, values = (
        torch.stack(
            [
                torch.cat([getattr(strand, name) for strand in memory.all_strands()] + [new[:, None]], dim=1)
                for memory, new in zip(memories, rows_of, strict=True)
            ]
        )
        for name, rows_of in (("keys", k_BGD), ("values", v_BGD))
    )

    def repeated() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q_BHD[:, :, None], keys, values, enable_gqa=True
        )[:, :, 0]

    error = float((shared() - repeated()).abs().max())
    ratios = []
    for number in range(run.pick(15, 2)):
        yield f"attention, round {number + 1}"
        ratios.append(_seconds(repeated) / _seconds(shared))
    return {
        "attention_error": Quantity(error, ""),
        "attention_ratio_to_torch": Quantity.median(ratios, "x"),
    }


def _samples(lm: LanguageModel, text: list[int], run: Run) -> Measurements:
    """Samples of one long prompt, from one stored beginning and from a beginning repeated for each."""
    length, count, new_tokens = run.pick((2048, 32, 32), (96, 3, 3))
    beginning = text[:length]
    prompts = [[*beginning, token] for token in _distinct(text[length:], count)]
    read = lm.model.new_past(lm.plan)
    lm.new_engine().read(beginning, read)
    read = read.fork()
    ratios: list[float] = []
    kept: dict[str, int] = {}
    for number in range(run.pick(3, 1)):
        yield f"{count} samples, round {number + 1}"
        shared = lm.new_engine(rows_per_step=max(512, length), memory_bytes=2**36)
        fast = _decode(shared, lm, prompts, new_tokens, [None] * count)
        kept["shared"] = shared.metrics.memory_bytes
        own = [_own_copy(read, 0) for _ in prompts]
        slow = _decode(lm.new_engine(), lm, prompts, new_tokens, own)
        kept["repeated"] = sum(past.nbytes() for past in own)
        _check_equal(fast[1], slow[1])
        ratios.append(slow[0] / fast[0])
    return {
        "samples_speed_ratio": Quantity.median(ratios, "x"),
        "samples_bytes_ratio": Quantity(kept["repeated"] / kept["shared"], "x"),
        "samples_bytes_shared": Quantity(kept["shared"] / 1e6, "MB"),
    }


def _two_levels(lm: LanguageModel, text: list[int], run: Run) -> Measurements:
    """Samples of several problems behind one introduction: both levels shared, and the first one only."""
    lead, statement, problems, samples, new_tokens = run.pick((2048, 300, 8, 8, 16), (64, 32, 2, 2, 3))
    introduction = lm.model.new_past(lm.plan)
    engine = lm.new_engine()
    engine.read(text[:lead], introduction)
    prompts: list[list[int]] = []
    both: list[Past] = []
    for number in range(problems):
        yield f"reading problem {number + 1} of {problems}"
        start = lead + number * (statement + samples)
        tokens = text[:lead] + text[start : start + statement]
        problem = introduction.fork()
        engine.read(tokens, problem)
        last = _distinct(text[start + statement :], samples)
        prompts += [[*tokens, token] for token in last]
        both += [problem.fork() for _ in range(samples)]
    ratios = []
    for number in range(run.pick(3, 1)):
        yield f"two levels, round {number + 1}"
        fast = _decode(engine, lm, prompts, new_tokens, [past.fork() for past in both])
        slow = _decode(engine, lm, prompts, new_tokens, [_own_copy(past, 1) for past in both])
        _check_equal(fast[1], slow[1])
        ratios.append(slow[0] / fast[0])
    return {"two_levels_speed_ratio": Quantity.median(ratios, "x")}


def _own_copy(past: Past, shared: int) -> Past:
    """A fork of a past with all strands copied but the first few of each layer."""
    from plait.memory import Memory

    twin = past.fork()
    for layer in twin.layers:
        assert isinstance(layer, Memory)
        layer.strands[shared:] = [strand.copied() for strand in layer.strands[shared:]]
    return twin


def _decode(
    engine: Engine,
    lm: LanguageModel,
    prompts: list[list[int]],
    new_tokens: int,
    pasts: list[Past] | list[None],
) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds of the steps in which every sequence generates, and what was generated."""
    sequences = [
        engine.submit(lm.request(prompt, max_new_tokens=new_tokens, ignore_end=True), past)
        for prompt, past in zip(prompts, pasts, strict=True)
    ]
    while any(not sequence.choices for sequence in sequences):
        engine.step()
    # Ahead of its neighbours by the step in which they began, the first sequence ends before them.
    steps = new_tokens - max(len(sequence.choices) for sequence in sequences)
    seconds = _seconds(lambda: [engine.step() for _ in range(steps)])
    for _ in engine.run():
        pass
    return seconds / steps, [sequence.result().tokens for sequence in sequences]


def _check_equal(fast: list[tuple[int, ...]], slow: list[tuple[int, ...]]) -> None:
    differing = sum(a != b for a, b in zip(fast, slow, strict=True))
    if differing:
        raise MeasurementError(
            f"{differing} of {len(fast)} answers depend on sharing, so no speed is reported."
        )


def _distinct(tokens: list[int], count: int) -> list[int]:
    """The first few different tokens."""
    return list(dict.fromkeys(tokens))[:count]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _measure(run: Run) -> Measurements:
    import plait
    from plait.claims.texts import manual

    quantities = yield from _attention(run)
    yield "loading smollm2"
    lm = plait.load("smollm2", weights="fp32")
    text = lm.encode(manual())
    quantities |= yield from _samples(lm, text, run)
    quantities |= yield from _two_levels(lm, text, run)
    return quantities


CLAIM = Claim(
    name="shared-prefix",
    title="A common beginning is read once for the whole batch",
    source="Juravsky et al. 2024, Hydragen: High-Throughput LLM Inference with Shared Prefixes, arXiv:2402.05099",
    headline=(
        "Up to 32 times the end-to-end throughput of competitive baselines, with CodeLlama-13B on 8 A100, growing "
        "with batch and shared length; a further 55% less time with two levels of sharing."
    ),
    scale=(
        "One layer's attention in the shape of SmolLM2 (9 query and 3 key/value heads of 64): 32 sequences behind "
        "4,096 common tokens, 64 of their own, beside torch's scaled_dot_product_attention on a cache that repeats "
        "them. SmolLM2-135M in fp32, greedy: 32 samples of 32 tokens behind one prompt of 2,048 tokens of Python's "
        "manual, and 8 samples each of 8 problems of 300 tokens behind 2,048 common ones, beside the same "
        "engine with every sequence keeping its own copy (of all, or of the problem). Steps in which all sequences "
        "generate, in turns, medians of 3 rounds; no speed is reported unless all answers are equal."
    ),
    bars=(
        Bar(
            quantity="attention_error",
            relation="<=",
            value=1e-5,
            unit="",
            why="The merge is exact, so only fp32 rounding is left.",
        ),
        Bar(
            quantity="attention_ratio_to_torch",
            relation=">=",
            value=3.0,
            unit="x",
            why="The keys of the beginning are read once, not 32 times; on a CPU the product then computes at its limit.",
        ),
        Bar(
            quantity="samples_speed_ratio",
            relation=">=",
            value=2.0,
            unit="x",
            why="At 2,048 common tokens a step without sharing mostly reads keys and values; the weights remain.",
        ),
        Bar(
            quantity="samples_bytes_ratio",
            relation=">=",
            value=15.0,
            unit="x",
            why="32 x 2,080 tokens against 2,048 + 32 x 32.",
        ),
        Bar(
            quantity="two_levels_speed_ratio",
            relation=">=",
            value=1.1,
            unit="x",
            why="The problems are an eighth as long as the introduction, so there is less to save.",
        ),
    ),
    measure=_measure,
)
