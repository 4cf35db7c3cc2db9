"""Reading few of the far blocks saves most of attention's time; what that costs a model, and one that was trained so."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run
from plait.claims.reading import token_nats

if TYPE_CHECKING:
    from plait.memory import Heads
    from plait.memory.policies import PrFlash

__all__ = ["CLAIM"]


def _prefill(heads: Heads, memory: str, length: int, chunk: int) -> float:
    """Seconds for one layer to attend to a prompt of random tokens."""
    import torch

    from plait.memory import Memory, MemoryPlan

    layer = Memory(heads, MemoryPlan.parse(memory))
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(chunk, count, heads.head_dim, generator=random)
        for count in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    )
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(length // chunk):
            layer.attend(q, k, v)
            layer.commit()
    return time.perf_counter() - start


def _blocks_read(policy: PrFlash, rows: int) -> tuple[int, float]:
    """Blocks that so many rows of blocks read, and their share of all earlier ones and their own."""
    read = sum(len(policy.kept(0, row)) for row in range(rows))
    return read, read / sum(range(1, rows + 1))


def _trained(run: Run) -> Generator[str, None, dict[str, Quantity]]:
    """What a model loses that learned to read through the memory, against one that learned with full attention."""
    from plait.claims.tuning import byte_model
    from plait.memory.policies import PrFlash
    from plait.train import python_corpus

    context, policy = 512, PrFlash(block=16)
    corpus = python_corpus(code=run.pick(0.5, 0.01))
    models = {}
    for name, memory in (("full", "full"), ("prflash", str(policy))):
        yield f"training a small model of {context} bytes through {memory}"
        models[name] = byte_model(
            run, corpus, rows=run.pick(1024, 64), trained=context, steps=500, memory=memory
        )
    tokenizer = models["full"].tokenizer
    long = [ids for ids in map(tokenizer.encode, corpus.held_out) if len(ids) >= context]
    texts = [ids[:context] for ids in long[-run.pick(24, 1) :]]
    found = {}
    for name, trained, memory in (
        ("trained_full", "full", "full"),
        ("trained_prflash", "prflash", str(policy)),
        ("untrained_prflash", "full", str(policy)),
        ("window_of_one_block", "full", f"window:size={policy.block},sinks=0"),
    ):
        yield f"reading {len(texts)} texts of {context} bytes: {name.replace('_', ' ')}"
        nats = [value for ids in texts for value in token_nats(models[trained], memory, ids, context)]
        found[f"small_{name}"] = Quantity(sum(nats) / len(nats), "nats", samples=len(nats))
    loss = found["small_trained_prflash"].value - found["small_trained_full"].value
    found["loss_when_trained"] = Quantity(loss, "nats", samples=found["small_trained_full"].samples)
    _, share = _blocks_read(policy, context // policy.block)
    found["blocks_read_when_trained"] = Quantity(share, "of blocks")
    return found


def _measure(run: Run) -> Measurements:
    from plait.claims.texts import token_runs
    from plait.engine import load
    from plait.memory import Memory, MemoryPlan
    from plait.memory.policies import PrFlash

    lm = load("smollm2")
    layer = lm.model.new_past(MemoryPlan.parse("full")).layers[0]
    assert isinstance(layer, Memory)
    length, chunk = run.pick((8192, 512), (512, 128))
    seconds: dict[str, list[float]] = {"full": [], "prflash": []}
    for number in range(run.pick(5, 1) + 1):
        yield f"prefill of one layer, round {number}"
        for memory in list(seconds)[:: 1 if number % 2 else -1]:
            taken = _prefill(layer.heads, memory, length, chunk)
            if number:
                seconds[memory].append(taken)
    policy = PrFlash()
    rows = length // policy.block
    read, share = _blocks_read(policy, rows)
    expected = sum(float(policy.probabilities(row).sum()) for row in range(rows))
    found = {
        **{f"prefill_{name}": Quantity.median(values, "s") for name, values in seconds.items()},
        "prefill_time_ratio": Quantity.median(
            [a / b for a, b in zip(seconds["prflash"], seconds["full"], strict=True)], "x"
        ),
        "blocks_read": Quantity(share, "of blocks"),
        "blocks_read_against_expected": Quantity(read / expected, "x"),
    }
    tokens = run.pick(1024, 128)
    (ids,) = token_runs(lm.tokenizer, [tokens])
    for name, memory in (
        ("full", "full"),
        ("harmonic", "prflash:block=32"),
        ("harmonic_without_sink", "prflash:block=32,sink_blocks=0"),
        ("power", "prflash:block=32,p=power"),
        ("bernoulli_corrected", "prflash:block=32,mode=bernoulli,correct=true"),
    ):
        yield f"reading {tokens} tokens with {memory}"
        later = token_nats(lm, memory, ids)[tokens // 4 :]
        found[f"nats_{name}"] = Quantity(sum(later) / len(later), "nats", samples=len(later))
    found["loss_without_sink"] = Quantity(
        found["nats_harmonic_without_sink"].value - found["nats_harmonic"].value, "nats"
    )
    return found | (yield from _trained(run))


CLAIM = Claim(
    name="prflash",
    title="Blocks seen with a probability",
    headline="Attention to earlier blocks with a probability that falls harmonically with their distance saves most of its time.",
    source="After Li 2024, arXiv:2410.18441, which gives no numbers; the formulas are our reading",
    scale=(
        "One layer of SmolLM2's geometry reads 8,192 random tokens in chunks of 512, blocks of 64, harmonic probabilities and one "
        "sink block, against full attention with the same kernel; turns in 5 rounds after a warm-up, medians. What it costs: "
        "SmolLM2-135M-Instruct, not trained with it, on tokens 256 to 1,024 of Python's manual with blocks of 32. What it "
        "costs a model that learned to read so: two models of bytes (2 blocks of width 96, 500 steps of 1,024 bytes of Python's "
        "library and manual, pieces of 512), one with full attention and one through prflash with blocks of 16 and fresh draws in "
        "every step, on 24 held-out texts of 512 bytes; there the draws are fixed."
    ),
    bars=(
        Bar(
            quantity="prefill_time_ratio",
            relation="<=",
            value=0.35,
            unit="x",
            why="About an eleventh of the blocks is read; the rest is the cost of many small calls.",
        ),
        Bar(
            quantity="blocks_read_against_expected",
            relation="<=",
            value=1.15,
            unit="x",
            why="A budget rounds up to whole blocks in every row.",
        ),
        Bar(
            quantity="loss_without_sink",
            relation=">=",
            value=0.1,
            unit="nats",
            why="A pretrained model needs its first block; the page of the method says so.",
        ),
        Bar(
            quantity="loss_when_trained",
            relation="<=",
            value=0.05,
            unit="nats",
            why="A model that learned to read few blocks must read nearly as well as one that learned to read all.",
        ),
        Bar(
            quantity="blocks_read_when_trained",
            relation="<=",
            value=0.5,
            unit="of blocks",
            why="It must leave out at least half of the blocks, or there is nothing to learn.",
        ),
    ),
    measure=_measure,
)
