"""ThinK: key channels that the last queries use least are dropped, against two simpler choices."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run
from plait.claims.reading import pass_keys, pass_keys_found, pass_keys_found_in_prompts

if TYPE_CHECKING:
    from plait.memory import MemoryPlan

__all__ = ["CLAIM"]


def _plans(seed: int, capacity: int) -> dict[str, MemoryPlan]:
    import torch
    from torch import Tensor

    from plait.memory import FrozenStrand, MemoryPlan
    from plait.memory.codecs import ThinK

    generator = torch.Generator().manual_seed(seed)

    class KeysOnly(ThinK):
        """Channels by the size of the keys, whatever the queries."""

        def _key_channels(self, queries: Tensor, strand: FrozenStrand) -> Tensor:
            return super()._key_channels(torch.ones_like(queries), strand)

    class AtRandom(ThinK):
        """Any channels."""

        def _key_channels(self, queries: Tensor, strand: FrozenStrand) -> Tensor:
            chosen = super()._key_channels(queries, strand)
            scores = torch.rand(len(chosen), strand.heads.head_dim, generator=generator)
            return scores.topk(chosen.shape[1]).indices.sort().values.to(chosen.dtype)

    codes = "gear:bits=4,rank=0,rank_decode=0,sparsity=0,dtype=fp16"
    return {
        "think": MemoryPlan.parse("think:ratio=0.4"),
        "think_of_half": MemoryPlan.parse("think:ratio=0.5"),
        "keys_only": MemoryPlan(codec=KeysOnly(ratio=0.4)),
        "at_random": MemoryPlan(codec=AtRandom(ratio=0.4)),
        "think_and_codes": MemoryPlan.parse(f"think:ratio=0.4,{codes}"),
        "think_and_gear": MemoryPlan.parse("think:ratio=0.4,gear:bits=4,dtype=fp16"),
        "snapkv": MemoryPlan.parse(f"snapkv:capacity={capacity}"),
        "snapkv_and_think": MemoryPlan.parse(f"snapkv:capacity={capacity},think:ratio=0.4"),
    }


def _measure(run: Run) -> Measurements:
    from plait.claims.memories import add_fidelity, attention_against_dense, fidelity, fp16_bytes
    from plait.claims.texts import token_runs
    from plait.engine import load
    from plait.memory import MemoryPlan

    lm = load("smollm2", weights="fp32")
    prompt, following = run.pick((1024, 128), (192, 16))
    windows = token_runs(lm.tokenizer, [prompt + following] * run.pick(8, 1))
    found = yield from fidelity(lm, _plans(run.seed, run.pick(512, 96)), windows, prompt)
    quantities: dict[str, Quantity] = {}
    add_fidelity(quantities, found)
    fp16 = fp16_bytes(lm, prompt)
    divergence = {name: mean(one.divergence) for name, one in found.items()}
    quantities["of_keys_only"] = Quantity(divergence["think"] / divergence["keys_only"], "x")
    quantities["of_at_random"] = Quantity(divergence["think"] / divergence["at_random"], "x")
    # Both in fp32, so dense holds twice the bytes of fp16.
    quantities["bytes_saved"] = Quantity(1 - found["think"].nbytes[0] / (2 * fp16), "")
    without, with_think = found["snapkv"], found["snapkv_and_think"]
    quantities["snapkv_fewer_bytes_than_dense"] = Quantity(2 * fp16 / without.nbytes[0], "x")
    quantities["think_increase_over_snapkv"] = Quantity(
        mean(with_think.nats) - mean(without.nats), "nats", samples=len(windows)
    )
    quantities["bytes_saved_over_snapkv"] = Quantity(1 - with_think.nbytes[0] / without.nbytes[0], "")
    for name in ("think_and_codes", "think_and_gear"):
        quantities[f"{name}_fewer_bytes_than_fp16"] = Quantity(fp16 / found[name].nbytes[0], "x")

    keys = pass_keys(run.seed, run.pick(10, 1), 0.9)
    for name, find in (("found", pass_keys_found_in_prompts), ("found_when_asked_later", pass_keys_found)):
        hits = []
        for kind, memory in (("dense", "full"), ("think", "think:ratio=0.4")):
            yield f"looking for {len(keys)} pass keys with {kind}, {name.replace('_', ' ')}"
            hits.append(find(lm, memory, run.pick(2048, 400), keys))
            quantities[f"{name}_{kind}"] = Quantity(mean(map(float, hits[-1])), "of keys", samples=len(keys))
        same = mean(float(a == b) for a, b in zip(*hits, strict=True))
        quantities[f"{name}_as_dense"] = Quantity(same, "of keys", samples=len(keys))

    plan = MemoryPlan.parse("think:ratio=0.4")
    return quantities | (yield from attention_against_dense(run, "think", plan, quick_tokens=512))


CLAIM = Claim(
    name="think",
    title="Two fifths of the key channels are not needed",
    source="Xu et al. 2024, arXiv:2407.21018",
    headline=(
        "Over 20% less memory for keys and values at the same or better quality, on top of other savings (the paper: "
        "LLaMA-3 8B and 70B, Mistral 7B, LongBench)."
    ),
    scale=(
        "SmolLM2-135M-Instruct in fp32; 8 windows of Python's manual, 1,024 tokens stored at once and the law of the "
        "next 128 compared with that of exact memory; two fifths of the channels of each key head dropped, by the last "
        "32 queries, by the keys alone, and at random; alone, with 4-bit codes, and of what SnapKV keeps of a prompt, 512 tokens. 10 pass keys in 2,048 tokens of filler "
        "that end in the question, as the paper's prompts do; and asked later, when channels were chosen before the question "
        "was known. Attention of one layer for 8 sequences of 8,192 tokens, against dense fp32, in turns."
    ),
    bars=(
        Bar(
            quantity="of_keys_only",
            relation="<=",
            value=0.8,
            unit="x",
            why="The queries must have a say that pays.",
        ),
        Bar(
            quantity="of_at_random",
            relation="<=",
            value=0.1,
            unit="x",
            why="Channels differ greatly, so a choice of any must do far worse.",
        ),
        Bar(
            quantity="think_increase",
            relation="<=",
            value=0.05,
            unit="nats",
            why="Quality must stay about that of all channels.",
        ),
        Bar(
            quantity="bytes_saved",
            relation=">=",
            value=0.19,
            unit="",
            why="A fifth, less what the newest tokens keep.",
        ),
        Bar(
            quantity="think_and_codes_fewer_bytes_than_fp16",
            relation=">=",
            value=2.8,
            unit="x",
            why="The paper's saving together with a quantised cache, there of 2 bits.",
        ),
        Bar(
            quantity="think_and_codes_increase",
            relation="<=",
            value=0.12,
            unit="nats",
            why="Both losses together must stay small.",
        ),
        Bar(
            quantity="think_increase_over_snapkv",
            relation="<=",
            value=0.05,
            unit="nats",
            why="On top of a memory that has dropped tokens, quality must stay about that of all their channels.",
        ),
        Bar(
            quantity="bytes_saved_over_snapkv",
            relation=">=",
            value=0.15,
            unit="",
            why="The saving on top of token eviction: a fifth, less the last tokens, which keep all channels.",
        ),
        Bar(
            quantity="found_as_dense",
            relation=">=",
            value=0.9,
            unit="of keys",
            why="What was said far back must be found as it is with all channels.",
        ),
        Bar(
            quantity="attention_speed",
            relation=">=",
            value=1.1,
            unit="x",
            why="A fifth fewer numbers are read, which must be seen in time and not in bytes alone.",
        ),
    ),
    measure=_measure,
)
