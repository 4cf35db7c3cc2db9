"""GEAR: low-bit keys and values whose error a low-rank part and a few outliers repair."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

if TYPE_CHECKING:
    from plait.engine import LanguageModel
    from plait.memory import MemoryPlan

__all__ = ["CLAIM"]

_PROMPT, _NEXT = 1024, 128
_CODES = "rank=0,rank_decode=0"
_MEMORIES = {
    f"{backbone}_{bits}_bits_{name}": f"gear:backbone={backbone},bits={bits}{settings}"
    for backbone, bits in (("kcvt", 4), ("kivi", 4), ("kivi", 2))
    for name, settings in (
        ("codes", f",{_CODES},sparsity=0"),
        ("outliers", f",{_CODES}"),
        ("low_rank", ",sparsity=0"),
        ("gear", ""),
    )
}


def _greedy(lm: LanguageModel, plan: MemoryPlan, prompt: list[int], count: int) -> tuple[int, ...]:
    """The likeliest tokens behind a prompt, read through a memory."""
    with lm.with_memory(plan).session() as session:
        session.read_tokens(prompt)
        return session.generate(max_new_tokens=count, ignore_end=True).tokens


def _measure(run: Run) -> Measurements:
    import torch

    from plait.claims.memories import add_fidelity, attention_against_dense, fidelity, fp16_bytes
    from plait.claims.texts import token_runs
    from plait.engine import load
    from plait.memory import Heads, Memory, MemoryPlan

    lm = load("smollm2", weights="fp32")
    prompt, following = run.pick((_PROMPT, _NEXT), (160, 16))
    windows = token_runs(lm.tokenizer, [prompt + following] * run.pick(8, 1))
    plans = {name: MemoryPlan.parse(spec) for name, spec in _MEMORIES.items()}
    found = yield from fidelity(lm, plans, windows, prompt)
    quantities: dict[str, Quantity] = {}
    add_fidelity(quantities, found)
    for name, one in found.items():
        share = one.nbytes[0] / fp16_bytes(lm, prompt)
        quantities[f"{name}_bytes_of_fp16"] = Quantity(share, "x")
    for name in ("kcvt_4_bits", "kivi_4_bits", "kivi_2_bits"):
        alone, repaired = (mean(found[f"{name}_{part}"].divergence) for part in ("codes", "gear"))
        quantities[f"{name}_ratio"] = Quantity(repaired / alone, "x", samples=len(windows))

    new = run.pick(64, 8)
    told: dict[str, list[float]] = {}
    for number, window in enumerate(windows):
        yield f"greedy answers behind window {number + 1} of {len(windows)}"
        exact = _greedy(lm, MemoryPlan(), window[:prompt], new)
        for part in ("codes", "low_rank", "gear"):
            answer = _greedy(lm, plans[f"kcvt_4_bits_{part}"], window[:prompt], new)
            same = next(
                (at for at, pair in enumerate(zip(answer, exact, strict=True)) if len({*pair}) > 1), new
            )
            told.setdefault(part, []).append(same / new)
    for part, shares in told.items():
        quantities[f"kcvt_4_bits_{part}_greedy"] = Quantity(mean(shares), "of tokens", samples=len(shares))
    for name, better, worse in (("both", "gear", "low_rank"), ("low_rank", "low_rank", "codes")):
        gain = mean(told[better]) - mean(told[worse])
        quantities[f"greedy_gain_of_{name}"] = Quantity(gain, "of tokens", samples=len(windows))

    yield "bytes of a longer past"
    heads = Heads(9, 3, 64, scale=64**-0.5)
    tokens = run.pick(4096 + 40, 128 + 40)
    memory = Memory(heads, MemoryPlan.parse(_MEMORIES["kcvt_4_bits_gear"]))
    numbers = torch.randn(2, tokens, 3, 64, generator=torch.Generator().manual_seed(run.seed))
    memory.append(*numbers[:, : tokens - 40])
    memory.commit()
    for token in range(tokens - 40, tokens):
        memory.append(*numbers[:, token : token + 1])
        memory.commit()
    quantities["fewer_bytes_than_fp16"] = Quantity(2 * tokens * 3 * 64 * 2 / memory.nbytes(), "x")

    return quantities | (
        yield from attention_against_dense(run, "gear", plans["kcvt_4_bits_gear"], quick_tokens=256)
    )


CLAIM = Claim(
    name="gear",
    title="Four-bit keys and values whose error is repaired",
    source="Kang et al. 2024, arXiv:2403.05527",
    headline=(
        "Near-lossless 4-bit keys and values, with up to 2.29 times less peak memory and 2.38 times the throughput "
        "of fp16 (the paper: LLaMA-2 7B and 13B, Mistral 7B, on one GPU with 24 GB)."
    ),
    scale=(
        "SmolLM2-135M-Instruct in fp32; 8 windows of Python's manual, 1,024 tokens stored at once and the law of the "
        "next 128 compared with that of exact memory. The codes alone, with outliers, with the low-rank part, and "
        "with both, in three backbones. Greedy answers of 64 tokens behind each window, as far as they are those of exact memory. Bytes over 4,136 tokens of one layer, buffer and factors included. Attention "
        "of one layer for 8 sequences of 8,192 tokens, against dense fp32, in turns."
    ),
    bars=(
        Bar(
            quantity="kcvt_4_bits_ratio",
            relation="<=",
            value=0.6,
            unit="x",
            why="Repair must take away two fifths of the divergence that 4-bit codes cause.",
        ),
        Bar(
            quantity="kivi_2_bits_ratio",
            relation="<=",
            value=0.65,
            unit="x",
            why="The same for 2-bit codes in groups, where there is more to repair.",
        ),
        Bar(
            quantity="kcvt_4_bits_gear_increase",
            relation="<=",
            value=0.03,
            unit="nats",
            why="Near-lossless, as the paper says of 4 bits.",
        ),
        Bar(
            quantity="greedy_gain_of_both",
            relation=">=",
            value=0.0,
            unit="of tokens",
            why="With outliers, greedy text must stay as long on the exact way as with the low-rank part alone.",
        ),
        Bar(
            quantity="greedy_gain_of_low_rank",
            relation=">=",
            value=0.0,
            unit="of tokens",
            why="And with the low-rank part as long as with the codes alone.",
        ),
        Bar(
            quantity="fewer_bytes_than_fp16",
            relation=">=",
            value=2.29,
            unit="x",
            why="The paper's saving of peak memory.",
        ),
        Bar(
            quantity="attention_speed",
            relation=">=",
            value=0.9,
            unit="x",
            why="Fewer bytes are read; turning codes into numbers must not cost more than that saves.",
        ),
    ),
    measure=_measure,
)
