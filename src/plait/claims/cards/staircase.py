"""The staircase: what fewer bits for older tokens cost, beside uniform bits of about the same size."""

from __future__ import annotations

from statistics import mean

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

__all__ = ["CLAIM"]

_MEMORIES = {
    "uniform_4": "saq:steps=rest@4",
    "uniform_3": "saq:steps=rest@3",
    "uniform_2": "saq:steps=rest@2",
    "to_4_with_sink": "saq:steps=64@16/128@8/rest@4,sink=64@8",
    "to_4": "saq:steps=64@16/128@8/rest@4",
    "to_3_with_sink": "saq:steps=64@16/128@4/rest@3,sink=64@8",
    "to_2_with_sink": "saq:steps=64@16/128@8/192@4/rest@2,sink=64@8",
    "to_2": "saq:steps=64@16/128@8/192@4/rest@2",
}


def _measure(run: Run) -> Measurements:
    from plait.claims.memories import fidelity, fp16_bytes
    from plait.claims.texts import token_runs
    from plait.engine import load
    from plait.memory import MemoryPlan

    lm = load("smollm2", weights="fp32")
    prompt, following = run.pick((2048, 128), (512, 16))
    windows = token_runs(lm.tokenizer, [prompt + following] * run.pick(6, 1))
    plans = {name: MemoryPlan.parse(spec) for name, spec in _MEMORIES.items()}
    found = yield from fidelity(lm, plans, windows, prompt)
    quantities: dict[str, Quantity] = {}
    for name, one in found.items():
        quantities[f"{name}_divergence"] = Quantity(mean(one.divergence), "nats", samples=len(windows))
        quantities[f"{name}_bytes_of_fp16"] = Quantity(one.nbytes[0] / fp16_bytes(lm, prompt), "x")
    staircase, uniform = found["to_4_with_sink"], found["uniform_4"]
    quantities["divergence_of_uniform"] = Quantity(mean(staircase.divergence) / mean(uniform.divergence), "x")
    quantities["bytes_of_uniform"] = Quantity(staircase.nbytes[0] / uniform.nbytes[0], "x")
    quantities["fewer_bytes_than_fp16"] = Quantity(fp16_bytes(lm, prompt) / staircase.nbytes[0], "x")
    return quantities


CLAIM = Claim(
    name="staircase",
    title="Fewer bits the older a token is",
    headline="Fewer bits for older keys and values save memory at a reasonable quality.",
    scale=(
        "SmolLM2-135M-Instruct in fp32; 6 windows of Python's manual, 2,048 tokens stored at once and the law of the "
        "next 128 compared with that of exact memory. Staircases that end at 4, 3 and 2 bits, with and without 8 bits "
        "for the first 64 tokens, beside uniform 4, 3 and 2 bits; groups of 64, all bytes counted. The bars are for "
        "the staircase to 4 bits with that step up."
    ),
    bars=(
        Bar(
            quantity="divergence_of_uniform",
            relation="<=",
            value=1.0,
            unit="x",
            why="More bits for the newest and the first tokens must pay in quality.",
        ),
        Bar(
            quantity="bytes_of_uniform",
            relation="<=",
            value=1.25,
            unit="x",
            why="They may cost a quarter more than uniform 4 bits, and no more.",
        ),
        Bar(
            quantity="fewer_bytes_than_fp16",
            relation=">=",
            value=2.5,
            unit="x",
            why="The point is memory.",
        ),
    ),
    measure=_measure,
)
